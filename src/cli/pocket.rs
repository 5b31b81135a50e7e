//! `radapt pocket draw | sheet | train | score`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, value_parser};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage, imageops};
use radapt::Error;
use radapt::pocket::{Dataset, KINDS, Split, draw};
use serde_json::json;

use super::options::argument;
use super::{Global, print};

#[derive(Args)]
pub struct Pocket {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Draw a folder of pictures with words, in the formats of V-Attack, COCO and CLIP_benchmark
    Draw(Draw),
    /// Draw one picture of them all, the kinds in columns
    Sheet(Sheet),
    /// Train a pocket model, or go on with it
    Train(super::pocket_train::Train),
    /// Score models on pictures of the pocket world
    Score(super::pocket_score::Score),
}

#[derive(Args)]
struct Draw {
    /// How many pictures
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    n: u64,
    /// The folder to write; it may not hold an earlier run
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The pictures' width and height, 96 to 224
    #[arg(long, value_name = "PIXELS", default_value_t = 96, value_parser = value_parser!(u32).range(96..=224))]
    size: u32,
    /// train, validation or test
    #[arg(long, value_name = "SPLIT", default_value = "test", value_parser = parse_split)]
    split: Split,
    /// The first picture's index in its split
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    start: u64,
}

#[derive(Args)]
struct Sheet {
    /// Where to write the picture, a PNG
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Each scene's width and height, 96 to 224
    #[arg(long, value_name = "PIXELS", default_value_t = 96, value_parser = value_parser!(u32).range(96..=224))]
    size: u32,
    /// Kinds side by side, 1 to 26; the others begin below them
    #[arg(long, value_name = "N", default_value_t = 13, value_parser = value_parser!(u32).range(1..=26))]
    columns: u32,
    /// Scenes above each other, 1 to 52
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..=52))]
    rows: u32,
}

pub fn parse_split(text: &str) -> Result<Split, String> {
    text.parse::<Split>().map_err(|e| e.to_string())
}

impl Pocket {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Draw(draw) => draw.run(global),
            Command::Sheet(sheet) => sheet.run(global),
            Command::Train(train) => train.run(global),
            Command::Score(score) => score.run(global),
        }
    }
}

impl Draw {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let Self { n, out, size, split, start } = self;
        let bar = global.bar("drawing", n);
        let drawn = Dataset { split, seed: global.seed, start, n, size }
            .write(&out, &mut |done| bar.set_position(done));
        bar.finish_and_clear();
        drawn?;
        let out = out.display().to_string();
        let json = json!({
            "n": n,
            "out": out,
            "images": "images",
            "files": Dataset::FILES,
            "kinds": KINDS.len(),
            "seed": global.seed,
            "split": split.name(),
            "start": start,
            "size": size,
        });
        print(global, json, &out)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Sheet {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let Self { out, size, columns, rows } = self;
        if !out.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) {
            let found = out.display().to_string();
            return Err(argument("--out", "a file name that ends in .png", &found).into());
        }
        let bands = (KINDS.len() as u32).div_ceil(columns);
        if !rows.is_multiple_of(bands) {
            let expected = format!("a multiple of {bands}, for {} kinds in {columns} columns", KINDS.len());
            return Err(argument("--rows", &expected, &rows.to_string()).into());
        }
        let spinner = global.spinner("drawing");
        let sheet = sheet(global.seed, size, columns, bands, rows / bands)?;
        spinner.set_message("writing");
        let mut bytes = Vec::new();
        let (width, height) = sheet.dimensions();
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Best, FilterType::Adaptive).write_image(
            &sheet,
            width,
            height,
            ExtendedColorType::Rgb8,
        )?;
        std::fs::write(&out, bytes).map_err(|source| Error::Write { path: out.clone(), source })?;
        spinner.finish_and_clear();
        let out = out.display().to_string();
        let json = json!({
            "out": out,
            "columns": columns,
            "rows": rows,
            "size": size,
            "width": width,
            "height": height,
            "kinds": KINDS.len(),
            "seed": global.seed,
            "split": Split::Validation.name(),
        });
        print(global, json, &out)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// `bands` bands of kinds, each `each` rows high: every kind's first scenes of the validation
/// split, white where there is no further kind.
fn sheet(seed: u64, size: u32, columns: u32, bands: u32, each: u32) -> radapt::Result<RgbImage> {
    let mut sheet = RgbImage::from_pixel(columns * size, bands * each * size, Rgb([255; 3]));
    let mut seen = [0; KINDS.len()];
    for index in 0.. {
        if seen.iter().all(|&n| n == each) {
            break;
        }
        let scene = draw(Split::Validation, seed, index, size)?;
        let n = &mut seen[scene.kind];
        if *n < each {
            let kind = scene.kind as u32;
            let (column, row) = (kind % columns, kind / columns * each + *n);
            imageops::replace(&mut sheet, &scene.picture, i64::from(column * size), i64::from(row * size));
            *n += 1;
        }
    }
    Ok(sheet)
}
