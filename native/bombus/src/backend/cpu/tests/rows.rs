//! Operations on rows of any width beside their definitions.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn rows_of_any_width_are_exact(
        rows in 1usize..40,
        width in prop_oneof![1usize..70, 1usize..700],
        dtype in floats(),
        seed in 1u64..1 << 40,
    ) {
        let mut numbers = Numbers(seed);
        let [x, y] = [(); 2].map(|()| numbers.take(rows * width));
        let x: Vec<f32> = x.into_iter().map(|x| 8.0 * x).collect();
        let norm = numbers.take(width);
        let (_folder, files) = write(&[("n", dtype, vec![width], bytes(&norm, dtype))]);
        let norm = rounded(&norm, dtype);
        let of = |value: f64, units: f64| Exact { value, error: units * 2f64.powi(-24) };
        for cpu in cpus() {
            let [a, b] = [&x, &y].map(|values| tensor(&cpu, rows, values));
            let normed = cpu.rms_norm(&a, &cpu.norm(&files.require("n").unwrap()).unwrap(), 1e-6);
            let (normed, swiglu) = (normed.unwrap(), cpu.swiglu(&a, &b).unwrap());
            let (sum, picked) = (cpu.add(&a, &b).unwrap(), cpu.gather_rows(&a, &[rows - 1, 0]).unwrap());
            let targets: Vec<u32> = (0..rows).map(|row| (row * 7 % width) as u32).collect();
            let log_probs = cpu.log_probs(&a, &targets).unwrap();
            for (row, (x, y)) in x.chunks(width).zip(y.chunks(width)).enumerate() {
                let pairs = || x.iter().zip(y).map(|(x, y)| (f64::from(*x), f64::from(*y)));
                let mean = pairs().map(|(x, _)| x * x).sum::<f64>() / width as f64;
                let factor = 1.0 / (mean + 1e-6).sqrt();
                let exact = pairs().zip(&norm).map(|((x, _), n)| x * factor * n);
                let sums = width as f64 / 16.0 + 10.0;
                let exact: Vec<_> = exact.map(|value| of(value, sums * value.abs())).collect();
                check(cpu.level, normed.row(row), &exact);
                // e^x to 2 units in the last place, and three operations.
                let silu = pairs().map(|(x, y)| x / (1.0 + (-x).exp()) * y);
                let exact: Vec<_> = silu.map(|value| of(value, 8.0 * value.abs())).collect();
                check(cpu.level, swiglu.row(row), &exact);
                let exact: Vec<_> = pairs().map(|(x, y)| of(x + y, (x + y).abs())).collect();
                check(cpu.level, sum.row(row), &exact);
                let total: f64 = pairs().map(|(x, _)| x.exp()).sum();
                let log_prob = f64::from(x[targets[row] as usize]) - total.ln();
                check(cpu.level, &log_probs[row..=row], &[of(log_prob, 200.0 + log_prob.abs())]);
            }
            prop_assert_eq!([picked.row(0), picked.row(1)], [a.row(rows - 1), a.row(0)]);
        }
    }
}
