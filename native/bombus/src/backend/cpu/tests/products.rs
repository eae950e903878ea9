//! Products with weights beside the exact ones. What they may be off by follows from the formats:
//! the limbs of x, and the roundings of sums in f32.

use super::*;

/// A rounding of f32, as a fraction of the number.
const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;

/// What x is like: its limbs are those of a group's largest.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Plain,
    Signs,
    Outliers,
    EmptyGroups,
    Tiny,
    Huge,
}

fn kinds() -> impl Strategy<Value = Kind> {
    use Kind::*;
    prop::sample::select(vec![Plain, Signs, Outliers, EmptyGroups, Tiny, Huge])
}

fn activations(numbers: &mut Numbers, count: usize, kind: Kind) -> Vec<f32> {
    let of = |(place, x): (usize, f32)| match kind {
        Kind::Plain => x,
        Kind::Signs => x.signum(),
        Kind::Outliers if place % 37 == 5 => 1000.0 * x,
        Kind::Outliers => x,
        Kind::EmptyGroups if place / 32 % 3 == 1 => 0.0,
        Kind::EmptyGroups => x,
        Kind::Tiny => 1e-20 * x,
        Kind::Huge => 1e20 * x,
    };
    numbers.take(count).into_iter().enumerate().map(of).collect()
}

/// A layer of a checkpoint: quantized where it has a layout, else dense.
#[derive(Clone, Debug)]
struct Layer {
    layout: Option<(usize, usize)>,
    dtype: Dtype,
    out_features: usize,
    /// Whether its weights lie around zero, as those of models do.
    centred: bool,
}

fn layers() -> impl Strategy<Value = Layer> {
    let bits = prop::sample::select(vec![2usize, 3, 4, 5, 6, 8]);
    let group_size = prop::sample::select(vec![32usize, 64, 128]);
    let layout = prop::option::weighted(0.85, (bits, group_size));
    let out_features = prop_oneof![1usize..9, 1usize..64, 60usize..200];
    let fields = (layout, floats(), out_features, any::<bool>());
    fields.prop_map(|(layout, dtype, out_features, centred)| Layer {
        layout,
        dtype,
        out_features,
        centred,
    })
}

/// How many units of the last limb the largest x has.
fn units(bits: i32, limbs: i32) -> f64 {
    (2f64.powi(bits - 1) - 1.0) * 2f64.powi(bits * (limbs - 1))
}

/// The tensors of a layer in the file, and its weights: `[out][in]` of number and the sizes of what
/// it is made of.
struct Made {
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    weights: Vec<f64>,
    sizes: Vec<f64>,
}

impl Layer {
    fn make(&self, name: usize, columns: usize, numbers: &mut Numbers) -> Made {
        let Some((bits, group_size)) = self.layout else {
            return self.make_dense(name, columns, numbers);
        };
        let (rows, groups, dtype) = (self.out_features, columns / group_size, self.dtype);
        let levels = (1u32 << bits) as f32;
        let code = |x: f32| ((x.abs() * levels) as u8).min((levels - 1.0) as u8);
        let codes: Vec<u8> = numbers.take(rows * columns).into_iter().map(code).collect();
        let scales = numbers.take(rows * groups);
        let biases = match self.centred {
            true => scales.iter().map(|scale| -scale * levels / 2.0).collect(),
            false => numbers.take(rows * groups),
        };
        let shape = vec![rows, groups];
        let tensors = vec![
            (format!("{name}.w"), Dtype::U32, vec![rows, columns * bits / 32], pack(&codes, bits)),
            (format!("{name}.s"), dtype, shape.clone(), bytes(&scales, dtype)),
            (format!("{name}.b"), dtype, shape, bytes(&biases, dtype)),
        ];
        let (scales, biases) = (rounded(&scales, dtype), rounded(&biases, dtype));
        let terms = |(place, code): (usize, &u8)| {
            let group = place / group_size;
            (scales[group] * f64::from(*code), biases[group])
        };
        let terms: Vec<(f64, f64)> = codes.iter().enumerate().map(terms).collect();
        let weights = terms.iter().map(|(product, bias)| product + bias).collect();
        let sizes = terms.iter().map(|(product, bias)| product.abs() + bias.abs()).collect();
        Made { tensors, weights, sizes }
    }

    fn make_dense(&self, name: usize, columns: usize, numbers: &mut Numbers) -> Made {
        let (w, dtype) = (numbers.take(self.out_features * columns), self.dtype);
        let shape = vec![self.out_features, columns];
        let weights = rounded(&w, dtype);
        let sizes = weights.iter().map(|w| w.abs()).collect();
        let tensors = vec![(format!("{name}.w"), dtype, shape, bytes(&w, dtype))];
        Made { tensors, weights, sizes }
    }

    /// Half the last limb's unit, as a fraction of the largest x of a group.
    fn unit(&self, level: Level) -> f64 {
        match (self.layout, level, self.dtype) {
            (None, ..) => 0.0,
            // Limbs of 7 bits, and one more of them.
            (Some((bits, _)), Level::Avx2, dtype) if bits != 4 => {
                0.5 / units(7, if dtype == Dtype::F32 { 4 } else { 3 })
            }
            (_, _, dtype) => 0.5 / units(8, if dtype == Dtype::F32 { 3 } else { 2 }),
        }
    }

    /// One number of y: x and a row of weights.
    fn exact(&self, level: Level, x: &[f32], weights: &[f64], sizes: &[f64]) -> Exact {
        let group_size = self.layout.map_or(x.len(), |(_, group_size)| group_size);
        let mut exact = Exact { value: 0.0, error: 0.0 };
        let mut size = 0.0;
        let groups = x.chunks(group_size).zip(weights.chunks(group_size));
        for ((x, weights), sizes) in groups.zip(sizes.chunks(group_size)) {
            let peak = x.iter().fold(0.0f64, |peak, x| peak.max(f64::from(x.abs())));
            let total: f64 = weights.iter().map(|w| w.abs()).sum();
            let products = x.iter().zip(weights).map(|(x, w)| f64::from(*x) * w);
            exact.value += products.sum::<f64>();
            exact.error += peak * total * self.unit(level);
            size += x.iter().zip(sizes).map(|(x, s)| f64::from(x.abs()) * s).sum::<f64>();
        }
        // As many sums in a row as a lane makes, a few after them, and the numbers' own roundings.
        let sums = x.len() as f64 / if self.layout.is_some() { 32.0 } else { 16.0 } + 12.0;
        exact.error += sums * ROUNDING * size;
        exact
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn layers_are_exact_in_every_shape_on_every_level(
        layers in prop::collection::vec(layers(), 1..4),
        kind in kinds(),
        rows in prop_oneof![Just(1usize), 1usize..9, 1usize..40, 40usize..120],
        // Of 128 columns: some rows are wider than what is unpacked at a time.
        columns in prop_oneof![1usize..8, 8usize..24],
        rest in prop::sample::select(vec![0usize, 32, 64, 96]),
        odd in 1usize..32,
        seed in 1u64..1 << 40,
    ) {
        let largest = layers.iter().filter_map(|layer| layer.layout).map(|(_, size)| size).max();
        // Dense layers alone may have any width.
        let columns = match largest {
            None => 8 * columns + odd,
            Some(size) => (128 * columns + rest) / size * size,
        };
        let mut numbers = Numbers(seed);
        let x = activations(&mut numbers, rows * columns, kind);
        let made: Vec<Made> = layers
            .iter()
            .enumerate()
            .map(|(name, layer)| layer.make(name, columns, &mut numbers))
            .collect();
        let tensors = made.iter().flat_map(|made| &made.tensors);
        let tensors: Vec<_> = tensors
            .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, shape.clone(), bytes.clone()))
            .collect();
        let (_folder, files) = write(&tensors);
        let weights = layers.iter().enumerate().map(|(name, layer)| LinearWeights {
            weight: files.require(&format!("{name}.w")).unwrap(),
            quantized: layer.layout.map(|(bits, group_size)| QuantizedWeights {
                scales: files.require(&format!("{name}.s")).unwrap(),
                biases: files.require(&format!("{name}.b")).unwrap(),
                layout: Quantization { group_size, bits },
            }),
            bias: None,
            out_features: layer.out_features,
        });
        let weights: Vec<LinearWeights> = weights.collect();
        for cpu in cpus() {
            let linear = cpu.linear(&weights).unwrap();
            let y = cpu.project(&linear, &tensor(&cpu, rows, &x), &[]).unwrap();
            for ((layer, made), y) in layers.iter().zip(&made).zip(&y) {
                for (row, x) in x.chunks_exact(columns).enumerate() {
                    let of = made.weights.chunks_exact(columns).zip(made.sizes.chunks_exact(columns));
                    let exact = of.map(|(w, sizes)| layer.exact(cpu.level, x, w, sizes));
                    check(cpu.level, y.row(row), &exact.collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn rows_of_an_embedding_are_exact(
        layer in layers(),
        columns in 1usize..12,
        seed in 1u64..1 << 40,
    ) {
        let columns = 128 * columns;
        let made = layer.make(0, columns, &mut Numbers(seed));
        let tensors: Vec<_> = made.tensors.iter()
            .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, shape.clone(), bytes.clone()))
            .collect();
        let (_folder, files) = write(&tensors);
        let weights = LinearWeights {
            weight: files.require("0.w").unwrap(),
            quantized: layer.layout.map(|(bits, group_size)| QuantizedWeights {
                scales: files.require("0.s").unwrap(),
                biases: files.require("0.b").unwrap(),
                layout: Quantization { group_size, bits },
            }),
            bias: None,
            out_features: layer.out_features,
        };
        for cpu in cpus() {
            let embedding = cpu.linear(std::slice::from_ref(&weights)).unwrap();
            let ids: Vec<Token> = (0..layer.out_features as u32).rev().map(Token::Id).collect();
            let x = cpu.embed(&embedding, &ids, None, &[]).unwrap();
            let of = made.weights.chunks_exact(columns).zip(made.sizes.chunks_exact(columns));
            for (row, (weights, sizes)) in of.rev().enumerate() {
                let exact = weights.iter().zip(sizes).map(|(&value, size)| {
                    Exact { value, error: 2.0 * ROUNDING * size }
                });
                check(cpu.level, x.row(row), &exact.collect::<Vec<_>>());
            }
        }
    }
}
