//! How long requests took, in eighths of powers of two of microseconds.

use super::Counter;
use serde_json::{Value, json};
use std::time::Duration;

/// Parts of each power of two.
const PARTS: usize = 8;
const PART_BITS: u32 = PARTS.ilog2();
/// Powers of two that are shown: entry `i` counts what took less than 2^i microseconds and is in no entry
/// before it; the last one, all the rest (half a minute and more).
const POWERS: usize = 27;
/// Below [`PARTS`] a bucket is a microsecond; the last one takes what is too long for the others.
const BUCKETS: usize = (POWERS - 1 - PART_BITS as usize) * PARTS + 1;

/// A histogram. One thread at a time adds to it.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_us: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: [const { Counter::new() }; BUCKETS], sum_us: Counter::default() }
    }
}

/// What a histogram held at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    buckets: [u64; BUCKETS],
    sum_us: u64,
}

/// The bucket of a time.
fn bucket_of(micros: u64) -> usize {
    if micros < PARTS as u64 {
        return micros as usize;
    }
    let power = micros.ilog2() - PART_BITS;
    let part = (micros >> power) as usize % PARTS;
    ((power as usize + 1) * PARTS + part).min(BUCKETS - 1)
}

/// The first time that is too long for the bucket, in microseconds; none for the last one.
fn end_of(bucket: usize) -> Option<u64> {
    let (row, part) = (bucket / PARTS, (bucket % PARTS) as u64);
    match row {
        _ if bucket == BUCKETS - 1 => None,
        0 => Some(part + 1),
        _ => Some((PARTS as u64 + part + 1) << (row - 1)),
    }
}

impl Histogram {
    /// Counts one more.
    pub fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(micros)].add(1);
        self.sum_us.add(micros);
    }

    /// What it holds now.
    pub fn read(&self) -> Reading {
        let buckets = std::array::from_fn(|number| self.buckets[number].get());
        Reading { buckets, sum_us: self.sum_us.get() }
    }

    /// What it holds now: sum, powers of two, quantiles.
    pub fn to_json(&self) -> Value {
        self.read().to_json()
    }
}

impl Reading {
    /// What is in this one but not in `part`, which is a part of it that was read before.
    pub fn without(&self, part: &Reading) -> Reading {
        let rest = |number: usize| self.buckets[number].saturating_sub(part.buckets[number]);
        Reading {
            buckets: std::array::from_fn(rest),
            sum_us: self.sum_us.saturating_sub(part.sum_us),
        }
    }

    /// Number of times.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All times together, in microseconds.
    pub fn sum_us(&self) -> u64 {
        self.sum_us
    }

    /// Powers of two of microseconds (none for the last entry) with the count of what is below.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        let mut count = 0;
        self.powers().into_iter().enumerate().map(move |(number, more)| {
            count += more;
            ((number < POWERS - 1).then_some(1 << number), count)
        })
    }

    fn powers(&self) -> [u64; POWERS] {
        let mut powers = [0; POWERS];
        for (number, count) in self.buckets.iter().enumerate() {
            let power = end_of(number)
                .map_or(POWERS - 1, |end| (u64::BITS - (end - 1).leading_zeros()) as usize);
            powers[power] += count;
        }
        powers
    }

    /// Sum, powers of two, and the quantiles that people ask for first.
    pub fn to_json(&self) -> Value {
        let powers = self.powers();
        let used = powers.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        json!({
            "sum_us": self.sum_us,
            "p50_us_max": self.quantile(0.5),
            "p99_us_max": self.quantile(0.99),
            "p999_us_max": self.quantile(0.999),
            "log2_us": &powers[..used],
        })
    }

    /// An upper bound of the quantile in microseconds, too high by an eighth at most; none if nothing was
    /// counted, or too long.
    fn quantile(&self, part: f64) -> Option<u64> {
        let total = self.count();
        if total == 0 {
            return None;
        }
        let rank = ((total as f64 * part).ceil() as u64).clamp(1, total);
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        bucket.and_then(end_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other() {
        let mut first = 0;
        for bucket in 0..BUCKETS - 1 {
            let end = end_of(bucket).expect("not the last one");
            assert!(end > first && (end - first) * PARTS as u64 <= first.max(PARTS as u64));
            assert_eq!((bucket_of(first), bucket_of(end - 1)), (bucket, bucket));
            first = end;
        }
        assert_eq!(first, 1 << (POWERS - 2), "the last one takes the rest");
        assert_eq!((bucket_of(first), bucket_of(u64::MAX)), (BUCKETS - 1, BUCKETS - 1));
    }

    #[test]
    fn powers_of_two_are_shown() {
        let histogram = Histogram::default();
        for micros in [0, 1, 2, 3, 4, 1023, 1024] {
            histogram.add(Duration::from_micros(micros));
        }
        histogram.add(Duration::from_secs(1_000_000));
        let value = histogram.to_json();
        let log2: Vec<u64> =
            value["log2_us"].as_array().expect("a list").iter().filter_map(Value::as_u64).collect();
        assert_eq!(log2[..5], [1, 1, 2, 1, 0]);
        assert_eq!((log2[10], log2[11], log2[26]), (1, 1, 1));
        assert_eq!(value["p50_us_max"], 4);
        assert_eq!(value["p99_us_max"], Value::Null);
        assert_eq!(histogram.read().cumulative().last(), Some((None, 8)));
        assert_eq!(histogram.read().cumulative().nth(1), Some((Some(2), 2)));
    }

    #[test]
    fn quantiles_are_within_an_eighth() {
        let (all, part) = (Histogram::default(), Histogram::default());
        for micros in 1..=1000 {
            all.add(Duration::from_micros(micros));
        }
        for micros in 501..=1000 {
            part.add(Duration::from_micros(micros));
        }
        let found = |reading: &Reading| reading.quantile(0.99).expect("many");
        assert!((990..=1114).contains(&found(&all.read())));
        let rest = all.read().without(&part.read());
        assert_eq!((rest.count(), rest.sum_us()), (500, 500 * 501 / 2));
        assert!((495..=557).contains(&found(&rest)));
    }

    #[test]
    fn nothing_counted() {
        assert_eq!(Histogram::default().to_json()["p50_us_max"], Value::Null);
    }
}
