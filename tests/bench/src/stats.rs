//! Medians, and how sure they are.

/// A median with an interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// Lower and upper bound of the interval.
    pub bounds: (f64, f64),
    /// Probability that the true median lies in the interval, whatever the distribution.
    pub coverage: f64,
}

/// The wanted probability.
const COVERAGE: f64 = 0.95;

/// The median of `values` with the interval of the sign test: from the k-th smallest to the k-th largest
/// value, with the largest k that covers the true median with a probability of 95 %. With fewer than six
/// values there is none; then the interval is from the smallest to the largest, which covers less.
pub fn estimate(values: &[f64]) -> Option<Estimate> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    let (first, last) = (*sorted.first()?, *sorted.last()?);
    let mut best = Estimate { median: middle(&sorted), bounds: (first, last), coverage: 0.0 };
    best.coverage = coverage(count, 1);
    for k in 2..=count / 2 {
        let covered = coverage(count, k);
        if covered < COVERAGE {
            break;
        }
        best.bounds = (sorted[k - 1], sorted[count - k]);
        best.coverage = covered;
    }
    Some(best)
}

/// The median of values in order.
fn middle(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 }
}

/// The median, 0 of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.into_iter().collect();
    estimate(&values).map_or(0.0, |estimate| estimate.median)
}

/// Probability that the median lies between the k-th smallest and the k-th largest of `count` values: none
/// of the two tails of the binomial distribution with p = 1/2.
fn coverage(count: usize, k: usize) -> f64 {
    let mut probability = 0.5f64.powi(count as i32);
    let mut tail = 0.0;
    for below in 0..k {
        tail += probability;
        probability *= (count - below) as f64 / (below + 1) as f64;
    }
    (1.0 - 2.0 * tail).max(0.0)
}

/// Parts of each power of two that [`Latencies`] tells apart.
const PARTS: u64 = 64;
const PART_BITS: u32 = PARTS.ilog2();

/// Latencies in buckets a 64th of a power of two wide: ratios near 1 are asked for.
#[derive(Clone, Debug)]
pub struct Latencies {
    buckets: Vec<u64>,
    count: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { buckets: vec![0; 64 * PARTS as usize], count: 0 }
    }
}

impl Latencies {
    /// Takes one, in nanoseconds.
    pub fn add(&mut self, ns: u64) {
        let ns = ns.max(PARTS);
        let power = ns.ilog2();
        let part = ns >> (power - PART_BITS) & (PARTS - 1);
        self.buckets[(u64::from(power) * PARTS + part) as usize] += 1;
        self.count += 1;
    }

    /// Takes those of another.
    pub fn merge(&mut self, other: &Latencies) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
    }

    /// The latency that a share of all stay under, in microseconds, to 2 %; 0 of nothing.
    pub fn quantile(&self, share: f64) -> f64 {
        let wanted = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            seen += bucket;
            if seen >= wanted && seen > 0 {
                let (power, part) = (index as u64 / PARTS, index as u64 % PARTS);
                let low = (PARTS + part) << (power as u32 - PART_BITS);
                return low as f64 / 1000.0;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The textbook's values: 7 values, smallest to largest: 98.4 %; 15 values, 4th to 12th: 96.5 %.
    #[test]
    fn the_interval_is_the_sign_tests() {
        let seven: Vec<f64> = (1..=7).map(f64::from).collect();
        let estimate7 = estimate(&seven).expect("values");
        assert_eq!((estimate7.median, estimate7.bounds), (4.0, (1.0, 7.0)));
        assert!((estimate7.coverage - 0.984).abs() < 0.001, "{estimate7:?}");
        let fifteen: Vec<f64> = (1..=15).rev().map(f64::from).collect();
        let estimate15 = estimate(&fifteen).expect("values");
        assert_eq!((estimate15.median, estimate15.bounds), (8.0, (4.0, 12.0)));
        assert!((estimate15.coverage - 0.965).abs() < 0.001, "{estimate15:?}");
        assert_eq!(estimate(&[]), None);
        assert_eq!(estimate(&[2.0]).map(|e| e.coverage), Some(0.0));
        assert_eq!(median([1.0, 2.0, 4.0, 3.0]), 2.5);
    }

    #[test]
    fn quantiles_are_within_2_percent() {
        let mut latencies = Latencies::default();
        for microseconds in 1..=1000u64 {
            latencies.add(microseconds * 1000);
        }
        for share in [0.01, 0.5, 0.99] {
            let (found, exact) = (latencies.quantile(share), share * 1000.0);
            assert!(found <= exact && found > exact * 0.98, "{share}: {found}");
        }
        assert_eq!(Latencies::default().quantile(0.5), 0.0);
    }
}
