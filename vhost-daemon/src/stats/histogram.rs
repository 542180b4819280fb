//! How long requests took, in powers of two of microseconds.

use super::Counter;
use serde_json::{Value, json};
use std::time::Duration;

/// Bucket `i` counts what took less than 2^i microseconds and is in no bucket before it; the last one, all
/// the rest (a minute and more).
const BUCKETS: usize = 27;

/// A histogram. One thread at a time adds to it.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_us: Counter,
}

impl Histogram {
    /// Counts one more.
    pub fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].add(1);
        self.sum_us.add(micros);
    }

    /// All times together, in microseconds.
    pub fn sum_us(&self) -> u64 {
        self.sum_us.get()
    }

    /// Upper bounds in microseconds (none for the last bucket) with the count of what is below.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        let mut count = 0;
        self.buckets.iter().enumerate().map(move |(number, bucket)| {
            count += bucket.get();
            ((number < BUCKETS - 1).then_some(1 << number), count)
        })
    }

    /// Sum, buckets, and the quantiles that people ask for first.
    pub fn to_json(&self) -> Value {
        let buckets: Vec<u64> = self.buckets.iter().map(Counter::get).collect();
        let used = buckets.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        json!({
            "sum_us": self.sum_us(),
            "p50_us_max": self.quantile(0.5),
            "p99_us_max": self.quantile(0.99),
            "p999_us_max": self.quantile(0.999),
            "log2_us": &buckets[..used],
        })
    }

    /// An upper bound of the quantile in microseconds; none if nothing was counted, or too long.
    fn quantile(&self, part: f64) -> Option<u64> {
        let total: u64 = self.buckets.iter().map(Counter::get).sum();
        if total == 0 {
            return None;
        }
        let rank = ((total as f64 * part).ceil() as u64).clamp(1, total);
        self.cumulative().find(|(_, count)| *count >= rank).and_then(|(bound, _)| bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two() {
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
        assert_eq!(histogram.cumulative().last(), Some((None, 8)));
        assert_eq!(histogram.cumulative().nth(1), Some((Some(2), 2)));
    }

    #[test]
    fn nothing_counted() {
        assert_eq!(Histogram::default().to_json()["p50_us_max"], Value::Null);
    }
}
