//! Charts: speed relative to a sparse raw file, as SVG and as PNG.
