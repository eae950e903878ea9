//! The layout of quantized weights.

/// Affine group quantization: `w = scale * code + bias`, one pair for every `group_size`
/// weights of a row, codes of `bits` packed from the low bits into u32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    pub group_size: usize,
    pub bits: usize,
}

impl Quantization {
    /// Whether MLX has this layout.
    pub fn is_affine(&self) -> bool {
        matches!(self.bits, 2..=6 | 8) && matches!(self.group_size, 32 | 64 | 128)
    }
}
