//! What happens to the disks, for those who subscribe by the control socket. Whoever publishes never
//! waits: a subscriber who does not keep up loses events, and is told how many.

use crate::scope;
use serde_json::{Value, json};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Events that wait for a subscriber to take them.
const WAITING_MAX: usize = 256;

static SUBSCRIBERS: Mutex<Vec<Subscriber>> = Mutex::new(Vec::new());

struct Subscriber {
    sender: SyncSender<Arc<str>>,
    lost: u64,
}

fn subscribers() -> MutexGuard<'static, Vec<Subscriber>> {
    SUBSCRIBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All events from now on, each a line of JSON without its end.
pub fn subscribe() -> Receiver<Arc<str>> {
    let (sender, receiver) = sync_channel(WAITING_MAX);
    subscribers().push(Subscriber { sender, lost: 0 });
    receiver
}

/// Something has happened to the disk that the calling thread serves.
pub fn publish(event: &str, data: Value) {
    publish_of(scope::disk(), event, data);
}

/// Something has happened to the disk of this name.
pub fn publish_of(disk: Option<&str>, event: &str, data: Value) {
    let mut subscribers = subscribers();
    if subscribers.is_empty() {
        return;
    }
    let mut line = json!({ "event": event, "time": now() });
    if let Some(disk) = disk {
        line["disk"] = json!(disk);
    }
    if !data.is_null() {
        line["data"] = data;
    }
    let line: Arc<str> = line.to_string().into();
    subscribers.retain_mut(|subscriber| subscriber.tell(&line));
}

/// Seconds since 1970.
pub fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_millis() as f64 / 1000.0
}

impl Subscriber {
    /// False if nobody listens any more.
    fn tell(&mut self, line: &Arc<str>) -> bool {
        if self.lost > 0 {
            let lost = json!({ "event": "lost", "time": now(), "data": { "events": self.lost } });
            match self.sender.try_send(lost.to_string().into()) {
                Ok(()) => self.lost = 0,
                Err(TrySendError::Full(_)) => {
                    self.lost += 1;
                    return true;
                }
                Err(TrySendError::Disconnected(_)) => return false,
            }
        }
        match self.sender.try_send(line.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.lost += 1;
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_subscriber_loses_events_and_nobody_waits() {
        let slow = subscribe();
        let gone = subscribe();
        drop(gone);
        for number in 0..WAITING_MAX + 10 {
            publish_of(Some("d"), "test", json!({ "number": number }));
        }
        assert_eq!(slow.try_iter().count(), WAITING_MAX);
        publish_of(Some("d"), "test", Value::Null);
        let rest: Vec<Value> =
            slow.try_iter().map(|line| serde_json::from_str(&line).expect("JSON")).collect();
        assert_eq!(rest[0]["event"], "lost");
        assert_eq!(rest[0]["data"]["events"], 10);
        assert_eq!((&rest[1]["event"], &rest[1]["disk"]), (&json!("test"), &json!("d")));
        assert_eq!(rest.len(), 2);
    }
}
