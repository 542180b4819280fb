//! A chart: speed relative to a sparse raw file, as SVG and as PNG, drawn alike on two canvases.

use crate::Result;
use crate::backend::Target;
use crate::report::Results;
use crate::session::Sample;
use crate::stats::Estimate;
use font8x8::legacy::BASIC_LEGACY;
use std::fmt::Write;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

type Color = [u8; 3];

const BLACK: Color = [30, 30, 30];
const GREY: Color = [205, 205, 205];
const WHITE: Color = [255, 255, 255];
const SERIES: [(Target, Color); 3] = [
    (Target::Exd, [31, 119, 80]),
    (Target::Full, [150, 180, 215]),
    (Target::Qcow2, [222, 143, 66]),
];

const WIDTH: i32 = 900;
/// Where the names of the workloads end.
const LEFT: i32 = 150;
const RIGHT: i32 = 60;
const TOP: i32 = 56;
const BOTTOM: i32 = 30;
const BAR: i32 = 9;
const ROW: i32 = BAR * 3 + 9;
/// The axis, in powers of two: from an eighth to sixteen times.
const LOW: f64 = -3.0;
const HIGH: f64 = 4.0;

/// What a chart is drawn on. Coordinates in pixels, from the upper left corner.
trait Canvas {
    fn rectangle(&mut self, x: i32, y: i32, width: i32, height: i32, color: Color);
    /// Text whose characters are 8 high and 8 wide (about that, in SVG); `y` is its upper edge.
    fn text(&mut self, x: i32, y: i32, text: &str);
}

/// Width of a text.
fn width(text: &str) -> i32 {
    text.len() as i32 * 8
}

/// Writes the charts beside a results file: the same name, ending in .svg and .png.
pub fn write(results: &Results, path: &Path) -> Result<()> {
    let height = TOP + BOTTOM + ROW * rows(results).len() as i32;
    let mut svg = Svg::new(height);
    draw(results, height, &mut svg);
    fs::write(path.with_extension("svg"), svg.finish())?;
    let mut image = Image::new(height);
    draw(results, height, &mut image);
    image.write(&path.with_extension("png"))
}

type Row<'a> = (&'a str, [Option<Estimate>; 3]);

/// The workloads in which a sparse raw file took part.
fn rows(results: &Results) -> Vec<Row<'_>> {
    let row = |name| {
        let ratio = |target| results.ratio((name, target), (name, Target::Raw), Sample::rate);
        (name, SERIES.map(|(target, _)| ratio(target)))
    };
    let rows = results.workloads().into_iter().map(row);
    rows.filter(|(_, ratios)| ratios[0].is_some()).collect()
}

/// The place of a ratio on the axis.
fn place(ratio: f64) -> i32 {
    let power = ratio.max(1e-9).log2().clamp(LOW, HIGH);
    LEFT + ((power - LOW) / (HIGH - LOW) * f64::from(WIDTH - LEFT - RIGHT)) as i32
}

fn draw(results: &Results, height: i32, canvas: &mut dyn Canvas) {
    canvas.rectangle(0, 0, WIDTH, height, WHITE);
    canvas.text(10, 10, "Speed relative to qemu-storage-daemon on a sparse raw file (= 1)");
    let mut x = 10;
    for ((_, color), name) in SERIES.into_iter().zip(["exd", "raw written before", "qcow2"]) {
        canvas.rectangle(x, 27, 10, 10, color);
        canvas.text(x + 14, 28, name);
        x += 40 + width(name);
    }
    let machine = &results.machine;
    let date = machine.date.split(' ').next().unwrap_or_default();
    let file_system = machine.file_system.split(' ').next().unwrap_or_default();
    canvas.text(x, 28, &format!("{date}, {}, {file_system}", machine.processor));
    for power in LOW as i32..=HIGH as i32 {
        let ratio = f64::from(power).exp2();
        let color = if power == 0 { BLACK } else { GREY };
        canvas.rectangle(place(ratio), TOP - 6, 1, height - TOP - BOTTOM + 10, color);
        let label =
            if power < 0 { format!("1/{}", 1 << -power) } else { format!("{}", 1 << power) };
        canvas.text(place(ratio) - width(&label) / 2, height - BOTTOM + 10, &label);
    }
    for (index, (name, ratios)) in rows(results).into_iter().enumerate() {
        let top = TOP + ROW * index as i32;
        canvas.text(LEFT - 8 - width(name), top + BAR, name);
        for (bar, (estimate, (_, color))) in ratios.iter().zip(SERIES).enumerate() {
            let Some(estimate) = estimate else { continue };
            draw_bar(canvas, top + BAR * bar as i32, estimate, color);
        }
    }
}

/// A bar from 1 to the ratio, with its interval as a line.
fn draw_bar(canvas: &mut dyn Canvas, y: i32, estimate: &Estimate, color: Color) {
    let (one, end) = (place(1.0), place(estimate.median));
    canvas.rectangle(one.min(end), y, (end - one).abs().max(1), BAR - 1, color);
    let (low, high) = (place(estimate.bounds.0), place(estimate.bounds.1));
    canvas.rectangle(low, y + BAR / 2 - 1, (high - low).max(1), 1, BLACK);
    canvas.text(end.max(high).max(one) + 4, y, &format!("{:.2}", estimate.median));
}

struct Svg(String);

impl Svg {
    fn new(height: i32) -> Svg {
        Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             font-family=\"monospace\" font-size=\"11\">\n"
        ))
    }

    fn finish(mut self) -> String {
        self.0 += "</svg>\n";
        self.0
    }
}

impl Canvas for Svg {
    fn rectangle(&mut self, x: i32, y: i32, width: i32, height: i32, [r, g, b]: Color) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" \
             fill=\"#{r:02x}{g:02x}{b:02x}\"/>"
        );
    }

    fn text(&mut self, x: i32, y: i32, text: &str) {
        let escaped = text.replace('&', "&amp;").replace('<', "&lt;");
        let (y, length) = (y + 8, width(text));
        let _ =
            writeln!(self.0, "<text x=\"{x}\" y=\"{y}\" textLength=\"{length}\">{escaped}</text>");
    }
}

/// Pixels of the image for each of the chart's, in both directions.
const SCALE: i32 = 2;

struct Image {
    height: i32,
    pixels: Vec<u8>,
}

impl Image {
    fn new(height: i32) -> Image {
        Image { height, pixels: vec![255; (WIDTH * SCALE * height * SCALE * 3) as usize] }
    }

    fn write(&self, path: &Path) -> Result<()> {
        let output = BufWriter::new(File::create(path)?);
        let (width, height) = ((WIDTH * SCALE) as u32, (self.height * SCALE) as u32);
        let mut encoder = png::Encoder::new(output, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header()?.write_image_data(&self.pixels)?;
        Ok(())
    }
}

impl Canvas for Image {
    fn rectangle(&mut self, x: i32, y: i32, width: i32, height: i32, color: Color) {
        for row in (y * SCALE).max(0)..((y + height) * SCALE).min(self.height * SCALE) {
            for column in (x * SCALE).max(0)..((x + width) * SCALE).min(WIDTH * SCALE) {
                let at = ((row * WIDTH * SCALE + column) * 3) as usize;
                self.pixels[at..at + 3].copy_from_slice(&color);
            }
        }
    }

    fn text(&mut self, x: i32, y: i32, text: &str) {
        for (index, byte) in text.bytes().enumerate() {
            let glyph = BASIC_LEGACY.get(usize::from(byte)).copied().unwrap_or_default();
            for (row, bits) in glyph.into_iter().enumerate() {
                for column in (0..8).filter(|column| bits >> column & 1 == 1) {
                    let left = x + index as i32 * 8 + column;
                    self.rectangle(left, y + row as i32, 1, 1, BLACK);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_is_logarithmic_and_bounded() {
        let steps = [place(2.0) - place(1.0), place(4.0) - place(2.0)];
        assert!((steps[0] - steps[1]).abs() <= 1, "{steps:?}");
        assert_eq!((place(0.0), place(1e9)), (LEFT, WIDTH - RIGHT));
    }
}
