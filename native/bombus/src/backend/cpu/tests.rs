//! The operations beside their definitions in f64, on every level of this machine, through the
//! files that they are read from.

use super::*;
use crate::backend::QuantizedWeights;
use crate::config::Quantization;
use crate::tensor_file::TensorFiles;
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView as Data;

/// Numbers from a seed, in -1..1.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        // xorshift64 (Marsaglia, 2003)
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn take(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

fn bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let of = |x: &f32| match dtype {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
        _ => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(of).collect()
}

/// What the checkpoint then holds.
fn rounded(values: &[f32], dtype: Dtype) -> Vec<f64> {
    Float::of(dtype).unwrap().to_f32(&bytes(values, dtype)).into_iter().map(f64::from).collect()
}

fn pack(codes: &[u8], bits: usize) -> Vec<u8> {
    let mut packed = vec![0u8; codes.len() * bits / 8];
    for (place, &code) in codes.iter().enumerate() {
        for bit in (0..bits).filter(|bit| code >> bit & 1 == 1) {
            packed[(place * bits + bit) / 8] |= 1 << ((place * bits + bit) % 8);
        }
    }
    packed
}

/// A file of its own for tensors of a name, a dtype, a shape and bytes.
fn write(tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> (tempfile::TempDir, TensorFiles) {
    let folder = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, Data::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let path = folder.path().join("model.safetensors");
    let mut file = safetensors::serialize(views, None).unwrap();
    // One more space behind the header: the tensors are aligned to nothing.
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) + 1;
    file[..8].copy_from_slice(&header.to_le_bytes());
    file.insert(7 + header as usize, b' ');
    std::fs::write(&path, file).unwrap();
    let files = TensorFiles::open_one(&path).unwrap();
    (folder, files)
}

fn cpus() -> Vec<Cpu> {
    let levels = Level::all().into_iter();
    levels.map(|level| Cpu::new(Options { threads: 2, level }).unwrap()).collect()
}

fn tensor(cpu: &Cpu, rows: usize, values: &[f32]) -> Tensor {
    let width = values.len() / rows;
    cpu.map(rows, width, |row, out| out.copy_from_slice(&values[row * width..][..width]))
}

/// x W' in f64; and the largest x of each group times the group's weights, what the errors of x
/// are measured by.
fn product(x: &[f32], weights: &[f64], columns: usize, group_size: usize) -> Vec<[f64; 2]> {
    let dot = |x: &[f32], w: &[f64]| {
        let groups = x.chunks(group_size).zip(w.chunks(group_size));
        groups.fold([0.0, 0.0], |[sum, size], (x, w)| {
            let largest = x.iter().fold(0.0f64, |largest, x| largest.max(f64::from(x.abs())));
            let own: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum();
            [sum + own, size + largest * w.iter().map(|w| w.abs()).sum::<f64>()]
        })
    };
    let rows = x.chunks_exact(columns);
    rows.flat_map(|x| weights.chunks_exact(columns).map(move |w| dot(x, w))).collect()
}

fn check(cpu: &Cpu, y: &Tensor, expected: &[[f64; 2]], error: f64) {
    for (place, [exact, size]) in expected.iter().enumerate() {
        let found = f64::from(y.row(place / y.width)[place % y.width]);
        let off = (found - exact).abs();
        assert!(off <= error * (size + 1e-6), "{:?} {place}: {found}, not {exact}", cpu.level);
    }
}

#[derive(Clone, Debug)]
struct Case {
    bits: usize,
    group_size: usize,
    dtype: Dtype,
    rows: usize,
    groups: usize,
    out_features: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (
        prop::sample::select(vec![2usize, 3, 4, 5, 6, 8]),
        prop::sample::select(vec![32usize, 64, 128]),
        prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::BF16]),
        prop::sample::select(vec![1usize, 2, 3, 4, 5, 8, 9, 16, 17, 33]),
        // Some rows are wider than what is unpacked at a time.
        prop_oneof![1usize..20, 32usize..40],
        1usize..60,
        1u64..1 << 40,
    )
        .prop_map(|(bits, group_size, dtype, rows, groups, out_features, seed)| Case {
            bits,
            group_size,
            dtype,
            rows,
            groups,
            out_features,
            seed,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn quantized_layers_are_exact(case in cases()) {
        let Case { bits, group_size, dtype, rows, groups, out_features, seed } = case;
        let (columns, mut numbers) = (groups * group_size, Numbers(seed));
        let codes: Vec<u8> = numbers
            .take(out_features * columns)
            .iter()
            .map(|x| ((x.abs() * (1u32 << bits) as f32) as u8).min(((1u32 << bits) - 1) as u8))
            .collect();
        let scales = numbers.take(out_features * groups);
        let biases = numbers.take(out_features * groups);
        // One of x towers over its group, where single digits would lose the others.
        let mut x = numbers.take(rows * columns);
        x[columns / 2] *= 100.0;
        let shape = vec![out_features, groups];
        let (_folder, files) = write(&[
            ("w", Dtype::U32, vec![out_features, columns * bits / 32], pack(&codes, bits)),
            ("s", dtype, shape.clone(), bytes(&scales, dtype)),
            ("b", dtype, shape, bytes(&biases, dtype)),
        ]);
        let weights = LinearWeights {
            weight: files.require("w").unwrap(),
            quantized: Some(QuantizedWeights {
                scales: files.require("s").unwrap(),
                biases: files.require("b").unwrap(),
                layout: Quantization { group_size, bits },
            }),
            out_features,
        };
        let (scales, biases) = (rounded(&scales, dtype), rounded(&biases, dtype));
        let floats: Vec<f64> = codes
            .iter()
            .enumerate()
            .map(|(place, code)| {
                scales[place / group_size] * f64::from(*code) + biases[place / group_size]
            })
            .collect();
        let expected = product(&x, &floats, columns, group_size);
        // 16 bits with their sign; f32's own sums.
        let error = if dtype == Dtype::F32 { 1e-6 } else { 1.0 / 60_000.0 };
        for cpu in cpus() {
            let linear = cpu.linear(std::slice::from_ref(&weights)).unwrap();
            let y = cpu.project(&linear, &tensor(&cpu, rows, &x), &[]).unwrap();
            check(&cpu, &y[0], &expected, error);
            let mut row = vec![0.0; columns];
            linear.row(out_features - 1, &mut row);
            for (found, exact) in row.iter().zip(&floats[(out_features - 1) * columns..]) {
                prop_assert!((f64::from(*found) - exact).abs() <= 1e-6 * (1.0 + exact.abs()));
            }
        }
    }

    #[test]
    fn dense_layers_are_exact(
        dtype in prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::BF16]),
        rows in 1usize..11,
        columns in 1usize..70,
        out_features in 1usize..40,
        seed in 1u64..1 << 40,
    ) {
        let mut numbers = Numbers(seed);
        let (w, x) = (numbers.take(out_features * columns), numbers.take(rows * columns));
        let (_folder, files) =
            write(&[("w", dtype, vec![out_features, columns], bytes(&w, dtype))]);
        let weight = files.require("w").unwrap();
        let weights = LinearWeights { weight, quantized: None, out_features };
        let expected = product(&x, &rounded(&w, dtype), columns, columns);
        for cpu in cpus() {
            let linear = cpu.linear(std::slice::from_ref(&weights)).unwrap();
            let y = cpu.project(&linear, &tensor(&cpu, rows, &x), &[]).unwrap();
            check(&cpu, &y[0], &expected, 1e-6);
        }
    }

    #[test]
    fn attention_is_the_definition_whatever_the_chunks(
        heads in prop::sample::select(vec![(1usize, 1usize), (2, 1), (4, 4), (6, 2), (8, 1), (5, 1)]),
        head_dim in prop::sample::select(vec![2usize, 6, 16, 24, 64, 128]),
        lengths in prop::collection::vec((1usize..150, 1usize..60), 1..4),
        half in any::<bool>(),
        seed in 1u64..1 << 40,
    ) {
        let (heads, kv_heads) = heads;
        let mut numbers = Numbers(seed);
        let norms = [numbers.take(head_dim), numbers.take(head_dim)];
        let dtype = if half { Dtype::BF16 } else { Dtype::F32 };
        let (_folder, files) = write(&[
            ("q", dtype, vec![head_dim], bytes(&norms[0], dtype)),
            ("k", dtype, vec![head_dim], bytes(&norms[1], dtype)),
        ]);
        let norms = norms.map(|norm| rounded(&norm, dtype));
        let shape = AttentionShape {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
        };
        let widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        // sequence -> q, k and v of all its positions
        let sequences: Vec<[Vec<f32>; 3]> = lengths
            .iter()
            .map(|(length, _)| widths.map(|width| numbers.take(length * width)))
            .collect();
        let exact: Vec<_> =
            sequences.iter().map(|sequence| attended(&shape, sequence, &norms)).collect();
        for cpu in cpus() {
            let norm = |name| cpu.norm(&files.require(name).unwrap()).unwrap();
            let head_norms = [norm("q"), norm("k")];
            let mut caches: Vec<Vec<Cache>> = sequences.iter().map(|_| cpu.cache(1)).collect();
            let mut done = vec![0; sequences.len()];
            // Steps of a chunk of every sequence that is not yet at its end.
            while done.iter().zip(&lengths).any(|(done, (length, _))| done < length) {
                let (mut segments, mut users, mut rows) = (vec![], vec![], [vec![], vec![], vec![]]);
                let mut end = 0;
                for (user, (length, chunk)) in lengths.iter().enumerate() {
                    let take = (*chunk).min(length - done[user]);
                    if take == 0 {
                        continue;
                    }
                    segments.push(Segment { rows: end..end + take, start: done[user] });
                    end += take;
                    for (part, width) in widths.into_iter().enumerate() {
                        let from = &sequences[user][part][done[user] * width..];
                        rows[part].extend_from_slice(&from[..take * width]);
                    }
                    users.push(user);
                }
                let qkv = rows.map(|values| tensor(&cpu, end, &values));
                let mut used: Vec<&mut Vec<Cache>> = caches
                    .iter_mut()
                    .enumerate()
                    .filter(|(user, _)| users.contains(user))
                    .map(|(_, cache)| cache)
                    .collect();
                let norms_of = [&head_norms[0], &head_norms[1]];
                let out = cpu.attention(&shape, 0, qkv, norms_of, &segments, &mut used).unwrap();
                for (segment, user) in segments.iter().zip(users) {
                    for row in segment.rows.clone() {
                        let position = segment.start + row - segment.rows.start;
                        let expected = &exact[user][position];
                        // A value of at most 1 in f16 is off by 2^-12.
                        let error = if half { 2e-3 } else { 2e-5 };
                        for (found, exact) in out.row(row).iter().zip(expected) {
                            let off = (f64::from(*found) - exact).abs();
                            prop_assert!(off < error, "{:?} {found}, not {exact}", cpu.level);
                        }
                    }
                    done[user] = segment.start + segment.rows.len();
                }
            }
            prop_assert!(caches.iter().all(|cache| !cpu.pages(cache).is_empty()));
        }
    }
}

/// Attention in f64, from its definition: `[position][head * head_dim]`.
fn attended(
    shape: &AttentionShape,
    [q, k, v]: &[Vec<f32>; 3],
    norms: &[Vec<f64>; 2],
) -> Vec<Vec<f64>> {
    let AttentionShape { head_dim: dim, num_attention_heads: heads, .. } = *shape;
    let kv_heads = shape.num_key_value_heads;
    let turned = |x: &[f32], norm: &[f64], position: usize| -> Vec<f64> {
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
        let factor = 1.0 / (mean + f64::from(shape.rms_norm_eps)).sqrt();
        let x: Vec<f64> = x.iter().zip(norm).map(|(x, n)| f64::from(*x) * factor * n).collect();
        let turn = |place: usize| {
            let pair = place % (dim / 2);
            let wave = f64::from(shape.rope_theta).powf(2.0 * pair as f64 / dim as f64);
            let (sin, cos) = (position as f64 / wave).sin_cos();
            match place < dim / 2 {
                true => x[place] * cos - x[place + dim / 2] * sin,
                false => x[pair] * sin + x[place] * cos,
            }
        };
        (0..dim).map(turn).collect()
    };
    let positions = v.len() / (kv_heads * dim);
    let all = |x: &[f32], norm: &[f64], heads: usize| -> Vec<Vec<f64>> {
        let rows = x.chunks_exact(dim).enumerate();
        rows.map(|(row, x)| turned(x, norm, row / heads)).collect()
    };
    let (queries, keys) = (all(q, &norms[0], heads), all(k, &norms[1], kv_heads));
    let one = |position: usize, head: usize| -> Vec<f64> {
        let kv = head / (heads / kv_heads);
        let query = &queries[position * heads + head];
        let score = |other: usize| {
            let key = &keys[other * kv_heads + kv];
            query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt()
        };
        let scores: Vec<f64> = (0..=position).map(score).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |other: usize, d: usize| f64::from(v[(other * kv_heads + kv) * dim + d]);
        let mixed = |d: usize| {
            weights.iter().enumerate().map(|(other, weight)| weight * value(other, d)).sum::<f64>()
        };
        (0..dim).map(|d| mixed(d) / total).collect()
    };
    (0..positions)
        .map(|position| (0..heads).flat_map(|head| one(position, head)).collect())
        .collect()
}

#[test]
fn what_is_no_number_stays_so() {
    let w = vec![1.0; 4 * 64];
    let (_folder, files) = write(&[
        ("w", Dtype::U32, vec![4, 8], vec![0x57; 4 * 32]),
        ("s", Dtype::BF16, vec![4, 1], bytes(&w[..4], Dtype::BF16)),
    ]);
    let scales = || files.require("s").unwrap();
    let weights = LinearWeights {
        weight: files.require("w").unwrap(),
        quantized: Some(QuantizedWeights {
            scales: scales(),
            biases: scales(),
            layout: Quantization { group_size: 64, bits: 4 },
        }),
        out_features: 4,
    };
    for cpu in cpus() {
        let linear = cpu.linear(std::slice::from_ref(&weights)).unwrap();
        for rows in [1, 6, 20] {
            for broken in [f32::NAN, f32::INFINITY] {
                let mut x = vec![1.0; rows * 64];
                x[5] = broken;
                let y = cpu.project(&linear, &tensor(&cpu, rows, &x), &[]).unwrap();
                assert!(y[0].row(0).iter().all(|y| !y.is_finite()), "{:?} {rows}", cpu.level);
                assert!((1..rows).all(|row| y[0].row(row).iter().all(|y| y.is_finite())));
            }
        }
        let gate = tensor(&cpu, 1, &[f32::NAN, 200.0, -200.0, 0.0]);
        let gated = cpu.gated(&gate, &tensor(&cpu, 1, &[1.0; 4])).unwrap();
        let gated = gated.row(0);
        assert!(gated[0].is_nan() && gated[1] == 200.0);
        assert!(gated[2].abs() < 1e-30 && gated[3] == 0.0);
    }
}
