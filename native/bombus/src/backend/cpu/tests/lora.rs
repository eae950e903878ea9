//! What adapters of any rank add to the rows of a layer, beside the exact sums.

use super::*;
use crate::backend::{LoraRows, LoraWeights};

/// A pair in PEFT's orientation or mlx-lm's, for one of fused layers and some rows of x.
#[derive(Clone, Debug)]
struct Case {
    rank: usize,
    dtype: Dtype,
    transposed: bool,
    index: usize,
    rows: Range<usize>,
    scale: f32,
}

fn pairs() -> impl Strategy<Value = Case> {
    let rank = prop_oneof![1usize..20, prop::sample::select(vec![32usize, 33, 64, 127])];
    let rows = (0usize..8, 1usize..6);
    (rank, floats(), any::<bool>(), 0usize..2, rows, -20.0f32..20.0).prop_map(
        |(rank, dtype, transposed, index, (start, count), scale)| Case {
            rank,
            dtype,
            transposed,
            index,
            rows: start..start + count,
            scale,
        },
    )
}

/// `[rows, columns]` in either orientation
fn at(
    values: &[f64],
    [rows, columns]: [usize; 2],
    transposed: bool,
    row: usize,
    column: usize,
) -> f64 {
    values[if transposed { column * rows + row } else { row * columns + column }]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn adapters_of_any_rank_are_exact(
        cases in prop::collection::vec(pairs(), 1..4),
        dtype in floats(),
        inputs in 1usize..150,
        outputs in prop::collection::vec(1usize..60, 2..3),
        seed in 1u64..1 << 40,
    ) {
        let (rows, mut numbers) = (13, Numbers(seed));
        let x = numbers.take(rows * inputs);
        let mut tensors = vec![];
        for (index, outputs) in outputs.iter().enumerate() {
            let zeros = bytes(&vec![0.0; outputs * inputs], dtype);
            tensors.push((format!("w{index}"), dtype, vec![*outputs, inputs], zeros));
        }
        let mut halves = vec![];
        for (place, case) in cases.iter().enumerate() {
            let mut half = |name: &str, [rows, columns]: [usize; 2], numbers: &mut Numbers| {
                let values = numbers.take(rows * columns);
                let shape = if case.transposed { vec![columns, rows] } else { vec![rows, columns] };
                tensors.push((format!("{name}{place}"), case.dtype, shape, bytes(&values, case.dtype)));
                rounded(&values, case.dtype)
            };
            let a = half("a", [inputs, case.rank], &mut numbers);
            halves.push((a, half("b", [case.rank, outputs[case.index]], &mut numbers)));
        }
        let named: Vec<_> = tensors.iter()
            .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, shape.clone(), bytes.clone()))
            .collect();
        let (_folder, files) = write(&named);
        let require = |name: String| files.require(&name).unwrap();
        let weights = |index: usize| LinearWeights {
            weight: require(format!("w{index}")),
            quantized: None,
            bias: None, out_features: outputs[index],
        };
        for cpu in cpus() {
            let linear = cpu.linear(&[weights(0), weights(1)]).unwrap();
            let load = |(place, case): (usize, &Case)| {
                let weights = LoraWeights {
                    a: require(format!("a{place}")),
                    b: require(format!("b{place}")),
                    transposed: case.transposed,
                    outputs: None,
                    scale: case.scale,
                    magnitude: None,
                };
                cpu.lora(&weights, Adapted::Projection(&linear, case.index)).unwrap()
            };
            let loras: Vec<Lora> = cases.iter().enumerate().map(load).collect();
            let used: Vec<LoraRows<Cpu>> = cases.iter().zip(&loras)
                .map(|(case, lora)| LoraRows { index: case.index, rows: case.rows.clone(), lora })
                .collect();
            let y = cpu.project(&linear, &tensor(&cpu, rows, &x), &used).unwrap();
            for (index, &outputs) in outputs.iter().enumerate() {
                for row in 0..rows {
                    let x = &x[row * inputs..][..inputs];
                    let exact: Vec<Exact> = (0..outputs).map(|output| {
                        let mut exact = Exact { value: 0.0, error: 1e-30 };
                        let own = cases.iter().zip(&halves).filter(|(case, _)| {
                            case.index == index && case.rows.contains(&row)
                        });
                        for (case, (a, b)) in own {
                            let (mut value, mut size) = (0.0, 0.0);
                            for r in 0..case.rank {
                                let b = at(b, [case.rank, outputs], case.transposed, r, output);
                                for (input, x) in x.iter().enumerate() {
                                    let a = at(a, [inputs, case.rank], case.transposed, input, r);
                                    value += f64::from(*x) * a * b;
                                    size += (f64::from(*x) * a * b).abs();
                                }
                            }
                            // Beside 16-bit weights both halves are rounded to f16.
                            let rounding = if dtype == Dtype::F32 { 0.0 } else { 2.0 * 2f64.powi(-11) };
                            let sums = (inputs / 16 + case.rank + 12) as f64 * 2f64.powi(-24);
                            let scale = f64::from(case.scale);
                            exact.value += scale * value;
                            exact.error += scale.abs() * size * (rounding + sums);
                            // The smallest of a half are rounded as fractions of its largest.
                            exact.error += if dtype == Dtype::F32 { 0.0 } else {
                                scale.abs() * (inputs * case.rank) as f64 * 2.0 * 2f64.powi(-24)
                            };
                        }
                        exact
                    }).collect();
                    check(cpu.level, y[index].row(row), &exact);
                }
            }
        }
    }
}
