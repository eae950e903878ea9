//! Attention over the caches of several sequences, in chunks, beside its definition.

use super::*;
use crate::spec::{NormSpec, NormedHeads, QkNorm, QueryScaling, Rope, Scaling};

/// Norms of q and k, of every kind and none.
fn qk_norms() -> impl Strategy<Value = Option<QkNorm>> {
    let kinds =
        [None, Some(NormedHeads::Each), Some(NormedHeads::EachRotated), Some(NormedHeads::All)];
    let norm = |heads| QkNorm { heads, ..QkNorm::each(NormSpec::rms(1e-6)) };
    prop::sample::select(kinds.to_vec()).prop_map(move |kind| kind.map(norm))
}

/// Heads that are rotated whole, in part, by neighbours, or not at all.
fn rotations() -> impl Strategy<Value = (usize, bool)> {
    (prop::sample::select(vec![0usize, 2, 4, 4, 4]), any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn attention_is_the_definition_whatever_the_chunks(
        heads in prop::sample::select(vec![(1usize, 1usize), (2, 1), (4, 4), (6, 2), (8, 1), (5, 1), (14, 2), (9, 3)]),
        head_dim in prop::sample::select(vec![2usize, 6, 16, 24, 34, 64, 80, 96, 128, 130, 256]),
        lengths in prop::collection::vec((1usize..150, 1usize..60), 1..4),
        half in any::<bool>(),
        qk_norm in qk_norms(),
        rotation in rotations(),
        window in prop::sample::select(vec![None, None, Some(1usize), Some(5), Some(64), Some(70)]),
        softcap in prop::sample::select(vec![None, None, Some(0.5f32)]),
        query_scaling in prop::sample::select(vec![None, Some(QueryScaling { beta: 0.5, context: 20 })]),
        seed in 1u64..1 << 40,
    ) {
        let (heads, kv_heads) = heads;
        let mut numbers = Numbers(seed);
        let (quarters, interleaved) = rotation;
        let rotated = (head_dim * quarters / 4).next_multiple_of(2).min(head_dim);
        let rope = (rotated > 0)
            .then(|| Rope { interleaved, ..Rope::new(rotated, 10_000.0, Scaling::None) });
        let spec = AttentionSpec {
            rope: rope.clone(),
            qk_norm,
            query_scaling,
            window,
            softcap,
            ..AttentionSpec::plain(heads, kv_heads, head_dim, Rope::new(2, 1.0, Scaling::None))
        };
        let kind = qk_norm.map_or(NormedHeads::Each, |norm| norm.heads);
        let norms = spec.norm_widths(kind).map(|width| numbers.take(width));
        let dtype = if half { Dtype::BF16 } else { Dtype::F32 };
        let (_folder, files) = write(&[
            ("q", dtype, vec![norms[0].len()], bytes(&norms[0], dtype)),
            ("k", dtype, vec![norms[1].len()], bytes(&norms[1], dtype)),
        ]);
        let norms = norms.map(|norm| rounded(&norm, dtype));
        let widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        // sequence -> q, k and v of all its positions
        let sequences: Vec<[Vec<f32>; 3]> = lengths
            .iter()
            .map(|(length, _)| widths.map(|width| numbers.take(length * width)))
            .collect();
        let exact: Vec<_> =
            sequences.iter().map(|sequence| attended(&spec, sequence, &norms)).collect();
        for cpu in cpus() {
            let norms = qk_norm.map(|_| ["q", "k"].map(|name| files.require(name).unwrap()));
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
            for (cache, (length, chunk)) in caches.iter().zip(&lengths) {
                // What stays is what the last chunk saw, and a page and a part of one before it.
                let (window, kept) = (window.unwrap_or(*length), cpu.kept_from(cache, 0));
                let seen = (*length).min(window + chunk);
                prop_assert!(kept <= length - seen.min(*length) || kept == 0);
                prop_assert!(cpu.pages(cache).len() <= seen / 64 + 4);
            }
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
    let kind = spec.qk_norm.map(|norm| norm.heads);
    let normed = |x: &[f64], all: &[f64], norm: &[f64]| -> Vec<f64> {
        let factor =
            1.0 / (all.iter().map(|x| x * x).sum::<f64>() / all.len() as f64 + 1e-6).sqrt();
        x.iter().zip(norm).map(|(x, n)| x * factor * n).collect()
    };
    let rotated = |x: &[f64], position: usize| -> Vec<f64> {
        let Some(rope) = &spec.rope else { return x.to_vec() };
        let (half, mut out) = (rope.dim / 2, x.to_vec());
        for pair in 0..half {
            let wave = f64::from(rope.theta).powf(2.0 * pair as f64 / rope.dim as f64);
            let (sin, cos) = (position as f64 / wave).sin_cos();
            let (low, high) =
                if rope.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
            out[low] = x[low] * cos - x[high] * sin;
            out[high] = x[low] * sin + x[high] * cos;
        }
        out
    };
    // row: all heads of a position
    let head = |row: &[f64], norm: &[f64], head: usize, position: usize| -> Vec<f64> {
        let x = &row[head * dim..][..dim];
        match kind {
            Some(NormedHeads::Each) => rotated(&normed(x, x, norm), position),
            Some(NormedHeads::EachRotated) => {
                let x = rotated(x, position);
                normed(&x, &x, norm)
            }
            Some(NormedHeads::All) => {
                rotated(&normed(x, row, &norm[head * dim..][..dim]), position)
            }
            None => rotated(x, position),
        }
    };
    let positions = v.len() / (kv_heads * dim);
    let all = |x: &[f32], norm: &[f64], heads: usize| -> Vec<Vec<f64>> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let rows = x.chunks_exact(dim * heads).enumerate();
        rows.flat_map(|(position, row)| (0..heads).map(move |at| (position, row, at)))
            .map(|(position, row, at)| head(row, norm, at, position))
            .collect()
    };
    let (queries, keys) = (all(q, &norms[0], heads), all(k, &norms[1], kv_heads));
    let one = |position: usize, head: usize| -> Vec<f64> {
        let kv = head / (heads / kv_heads);
        let query = &queries[position * heads + head];
        let longer = spec.query_scaling.map_or(1.0, |scaling| f64::from(scaling.factor(position)));
        let score = |other: usize| {
            let key = &keys[other * kv_heads + kv];
            let score = query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
            let score = score * longer / (dim as f64).sqrt();
            spec.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        };
        let first = spec.first_seen(position);
        let scores: Vec<f64> = (first..=position).map(score).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |other: usize, d: usize| f64::from(v[(other * kv_heads + kv) * dim + d]);
        let mixed = |d: usize| {
            let weighted = weights.iter().enumerate();
            weighted.map(|(other, weight)| weight * value(first + other, d)).sum::<f64>()
        };
        (0..dim).map(|d| mixed(d) / total).collect()
    };
    (0..positions)
        .map(|position| (0..heads).flat_map(|head| one(position, head)).collect())
        .collect()
}
