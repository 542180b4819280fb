//! What the demonstration shows: numbered steps, what was done with the time it took, and while something
//! runs a line that changes in place (on a terminal) or now and then a new one (in a log).

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// In a log, progress appears at most this often.
const LOG_PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// The standard output.
pub struct Screen {
    start: Instant,
    shown: Instant,
    steps: u32,
    terminal: bool,
    tick: &'static str,
}

impl Screen {
    pub fn new() -> Screen {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        let unicode =
            locale.is_some_and(|name| name.to_lowercase().replace('-', "").contains("utf8"));
        Screen {
            start: Instant::now(),
            shown: Instant::now(),
            steps: 0,
            terminal: std::io::stdout().is_terminal(),
            tick: if unicode { "\u{2713}" } else { "ok" },
        }
    }

    pub fn title(&mut self, text: &str) {
        println!("{text}");
    }

    /// The next step begins.
    pub fn step(&mut self, text: &str) {
        self.steps += 1;
        let number = self.steps;
        let text = if self.terminal { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() };
        println!("\n{number:>2}. {text}");
        self.progress("..");
    }

    /// A command line that does what this step does.
    pub fn command(&mut self, text: &str) {
        self.clear();
        println!("    $ {text}");
    }

    /// Something is under way.
    pub fn progress(&mut self, text: &str) {
        if self.terminal {
            print!("\r\x1b[K    {text}");
            // A terminal that is gone is no reason to stop.
            let _ = std::io::stdout().flush();
        } else if text != ".." && self.shown.elapsed() > LOG_PROGRESS_EVERY {
            println!("    .. {text}");
            self.shown = Instant::now();
        }
    }

    /// Something is done.
    pub fn done(&mut self, text: &str) {
        self.clear();
        let seconds = self.start.elapsed().as_secs_f32();
        println!("    {} {text}  [{seconds:.1} s]", self.tick);
        self.shown = Instant::now();
    }

    /// What a program printed, not more than `limit` lines of it.
    pub fn text(&mut self, text: &str, limit: usize) {
        self.clear();
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().take(limit) {
            println!("      {line}");
        }
        if lines.len() > limit {
            println!("      .. and {} lines more", lines.len() - limit);
        }
    }

    /// The last words.
    pub fn summary(&mut self, lines: &[(&str, String)]) {
        self.clear();
        let seconds = self.start.elapsed().as_secs();
        println!("\nSummary, after {seconds} s");
        for (name, text) in lines {
            println!("  {name:<11} {text}");
        }
        println!();
    }

    fn clear(&mut self) {
        if self.terminal {
            print!("\r\x1b[K");
        }
    }
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} bytes"),
    }
}
