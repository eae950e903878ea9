//! Operations on rows of any width beside their definitions.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn rows_of_any_width_are_exact(
        rows in 1usize..40,
        width in prop_oneof![1usize..70, 1usize..700],
        dtype in floats(),
        plus_one in any::<bool>(),
        centered in any::<bool>(),
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
            let weight = files.require("n").unwrap();
            let spec = NormSpec { eps: 1e-6, plus_one, centered };
            let normed = cpu.normalize(&a, &cpu.norm(&weight, &spec).unwrap(), &spec).unwrap();
            let glu = |activation| cpu.glu(&a, &b, activation).unwrap();
            let (swiglu, geglu) = (glu(Activation::Silu), glu(Activation::Gelu));
            let picked = cpu.gather_rows(&a, &[rows - 1, 0]).unwrap();
            let [sum, scaled] = [1.0, 0.25].map(|scale| cpu.add(&a, &b, scale).unwrap());
            let capped = cpu.softcap(tensor(&cpu, rows, &x), 3.0).unwrap();
            let targets: Vec<u32> = (0..rows).map(|row| (row * 7 % width) as u32).collect();
            let log_probs = cpu.log_probs(&a, &targets).unwrap();
            for (row, (x, y)) in x.chunks(width).zip(y.chunks(width)).enumerate() {
                let pairs = || x.iter().zip(y).map(|(x, y)| (f64::from(*x), f64::from(*y)));
                let mean = |of: &dyn Fn(f64) -> f64| {
                    pairs().map(|(x, _)| of(x)).sum::<f64>() / width as f64
                };
                let shift = if centered { mean(&|x| x) } else { 0.0 };
                let factor = 1.0 / (mean(&|x| (x - shift).powi(2)) + 1e-6).sqrt();
                let sums = width as f64 / 16.0 + 10.0;
                let exact = pairs().zip(&norm).map(|((x, _), n)| {
                    let weight = n + f64::from(u8::from(plus_one));
                    let value = (x - shift) * factor * weight;
                    // The mean is off by some of the largest's last places; x is at most 8.
                    let shifted = if centered { 8.0 * sums * (factor * weight).abs() } else { 0.0 };
                    of(value, sums * value.abs() + shifted + 2.0 * (x * factor).abs())
                });
                let exact: Vec<_> = exact.collect();
                check(cpu.level, normed.row(row), &exact);
                // e^x to 2 units in the last place, and three operations.
                let silu = pairs().map(|(x, y)| x / (1.0 + (-x).exp()) * y);
                let exact: Vec<_> = silu.map(|value| of(value, 8.0 * value.abs())).collect();
                check(cpu.level, swiglu.row(row), &exact);
                let gelu = pairs().map(|(x, y)| {
                    let u = (8.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                    // An exponent of u is off by some of u's last places.
                    let value = x / (1.0 + (-u).exp()) * y;
                    of(value, (10.0 + 8.0 * u.abs()) * value.abs() + 1e-30)
                });
                let exact: Vec<_> = gelu.collect();
                check(cpu.level, geglu.row(row), &exact);
                let exact: Vec<_> = pairs().map(|(x, y)| of(x + y, (x + y).abs())).collect();
                check(cpu.level, sum.row(row), &exact);
                let exact = pairs().map(|(x, y)| of(x + 0.25 * y, 2.0 * (x + 0.25 * y).abs()));
                let exact: Vec<_> = exact.collect();
                check(cpu.level, scaled.row(row), &exact);
                let exact = pairs().map(|(x, _)| of(3.0 * (x / 3.0).tanh(), 60.0));
                let exact: Vec<_> = exact.collect();
                check(cpu.level, capped.row(row), &exact);
                let total: f64 = pairs().map(|(x, _)| x.exp()).sum();
                let log_prob = f64::from(x[targets[row] as usize]) - total.ln();
                check(cpu.level, &log_probs[row..=row], &[of(log_prob, 200.0 + log_prob.abs())]);
            }
            prop_assert_eq!([picked.row(0), picked.row(1)], [a.row(rows - 1), a.row(0)]);
        }
    }
}
