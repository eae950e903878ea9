//! Attention over the caches of several sequences, in chunks, beside its definition.

use super::*;
use crate::spec::{NormSpec, Rope, Scaling};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn attention_is_the_definition_whatever_the_chunks(
        heads in prop::sample::select(vec![(1usize, 1usize), (2, 1), (4, 4), (6, 2), (8, 1), (5, 1), (14, 2), (9, 3)]),
        head_dim in prop::sample::select(vec![2usize, 6, 16, 24, 34, 64, 80, 96, 128, 130, 256]),
        lengths in prop::collection::vec((1usize..150, 1usize..60), 1..4),
        half in any::<bool>(),
        normed in any::<bool>(),
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
        let spec = AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            rope: Rope { dim: head_dim, theta: 10_000.0, scaling: Scaling::None },
            qk_norm: normed.then_some(NormSpec { eps: 1e-6 }),
            qkv_bias: false,
            o_bias: false,
        };
        let widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        // sequence -> q, k and v of all its positions
        let sequences: Vec<[Vec<f32>; 3]> = lengths
            .iter()
            .map(|(length, _)| widths.map(|width| numbers.take(length * width)))
            .collect();
        let exact: Vec<_> =
            sequences.iter().map(|sequence| attended(&spec, sequence, &norms)).collect();
        for cpu in cpus() {
            let norms = normed.then(|| ["q", "k"].map(|name| files.require(name).unwrap()));
            let layer = cpu.attention_layer(&spec, &AttentionWeights { norms, dtype }).unwrap();
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
                    for (kind, width) in widths.into_iter().enumerate() {
                        let from = &sequences[user][kind][done[user] * width..];
                        rows[kind].extend_from_slice(&from[..take * width]);
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
                let out = cpu.attention(&layer, 0, qkv, &segments, &mut used).unwrap();
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
    spec: &AttentionSpec,
    [q, k, v]: &[Vec<f32>; 3],
    norms: &[Vec<f64>; 2],
) -> Vec<Vec<f64>> {
    let AttentionSpec { head_dim: dim, heads, kv_heads, .. } = *spec;
    let rotated = |x: &[f32], norm: &[f64], position: usize| -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let mean = x.iter().map(|x| x.powi(2)).sum::<f64>() / dim as f64;
        let x: Vec<f64> = match spec.qk_norm {
            Some(NormSpec { eps }) => {
                let factor = 1.0 / (mean + f64::from(eps)).sqrt();
                x.iter().zip(norm).map(|(x, n)| x * factor * n).collect()
            }
            None => x,
        };
        let number = |place: usize| {
            let pair = place % (dim / 2);
            let wave = f64::from(spec.rope.theta).powf(2.0 * pair as f64 / dim as f64);
            let (sin, cos) = (position as f64 / wave).sin_cos();
            match place < dim / 2 {
                true => x[place] * cos - x[place + dim / 2] * sin,
                false => x[pair] * sin + x[place] * cos,
            }
        };
        (0..dim).map(number).collect()
    };
    let positions = v.len() / (kv_heads * dim);
    let all = |x: &[f32], norm: &[f64], heads: usize| -> Vec<Vec<f64>> {
        let rows = x.chunks_exact(dim).enumerate();
        rows.map(|(row, x)| rotated(x, norm, row / heads)).collect()
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
