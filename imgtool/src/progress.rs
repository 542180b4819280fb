//! `-p`: how far a copy is. The percentage as qemu-img prints it where nobody watches; a bar with
//! rate and time left on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal, Write};

/// Where progress is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Channel {
    /// Standard output, as qemu-img does.
    Stdout,
    /// Standard error, because the image itself goes to standard output.
    Stderr,
}

/// The progress of one command.
pub struct Progress {
    kind: Kind,
    total: u64,
    done: u64,
}

enum Kind {
    Silent,
    Bar(ProgressBar),
    Percent { channel: Channel, shown: Option<u64> },
}

impl Progress {
    /// Shows nothing.
    pub fn silent() -> Self {
        Progress { kind: Kind::Silent, total: 0, done: 0 }
    }

    /// For `total` bytes of work.
    pub fn new(total: u64, channel: Channel) -> Self {
        let terminal = match channel {
            Channel::Stdout => io::stdout().is_terminal(),
            Channel::Stderr => io::stderr().is_terminal(),
        };
        if !terminal {
            let mut progress =
                Progress { kind: Kind::Percent { channel, shown: None }, total, done: 0 };
            progress.show();
            return progress;
        }
        let bar = ProgressBar::with_draw_target(
            Some(total),
            match channel {
                Channel::Stdout => ProgressDrawTarget::stdout(),
                Channel::Stderr => ProgressDrawTarget::stderr(),
            },
        );
        let template =
            "    ({percent_precise}/100%) [{wide_bar}] {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Progress { kind: Kind::Bar(bar), total, done: 0 }
    }

    /// `bytes` more are done.
    pub fn advance(&mut self, bytes: u64) {
        self.done = self.done.saturating_add(bytes);
        self.show();
    }

    fn show(&mut self) {
        match &mut self.kind {
            Kind::Silent => {}
            Kind::Bar(bar) => bar.set_position(self.done.min(self.total)),
            Kind::Percent { channel, shown } => {
                // Per hundred thousand; qemu-img reports each whole percent.
                let share = match self.total {
                    0 => 10_000,
                    total => u128::from(self.done.min(total)) * 10_000 / u128::from(total),
                } as u64;
                if shown.is_none_or(|shown| share / 100 > shown / 100) {
                    *shown = Some(share);
                    let text = format!("    ({}.{:02}/100%)\r", share / 100, share % 100);
                    write_to(*channel, &text);
                }
            }
        }
    }

    /// All is done.
    pub fn finish(mut self) {
        self.done = self.total;
        self.show();
        match self.kind {
            Kind::Silent => {}
            Kind::Bar(bar) => bar.finish(),
            Kind::Percent { channel, .. } => write_to(channel, "\n"),
        }
    }
}

/// Progress that cannot be shown is no reason to stop working.
fn write_to(channel: Channel, text: &str) {
    let _ = match channel {
        Channel::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        }
        Channel::Stderr => io::stderr().lock().write_all(text.as_bytes()),
    };
}
