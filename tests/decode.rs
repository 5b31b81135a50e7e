//! Decoding of every variant of the five formats, of damaged files and of files over the limits.
//!
//! `tests/fixtures/decode/make.py` writes the files and what they should decode to.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use radapt::Error;
use radapt::image::{DecodeLimits, decode, decode_file};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Deserialize;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/decode");

#[derive(Deserialize)]
struct Fixtures {
    good: BTreeMap<String, Good>,
    bad: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Good {
    width: u32,
    height: u32,
    /// The largest difference to Pillow that is allowed.
    tolerance: u8,
    rgb: String,
}

fn fixtures() -> Fixtures {
    serde_json::from_slice(&fs::read(path("expected.json")).unwrap()).unwrap()
}

fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

#[test]
fn every_variant_decodes_as_expected() {
    let mut failures = Vec::new();
    for (name, good) in fixtures().good {
        let found = match decode_file(&path(&name), &DecodeLimits::default()) {
            Ok(found) => found,
            Err(error) => {
                failures.push(error.to_string());
                continue;
            }
        };
        if found.dimensions() != (good.width, good.height) {
            failures.push(format!("{name}: is {:?}, not {}x{}", found.dimensions(), good.width, good.height));
            continue;
        }
        let expected = unhex(&good.rgb);
        let differences: Vec<u8> = found.iter().zip(&expected).map(|(&a, &b)| a.abs_diff(b)).collect();
        let most = differences.iter().copied().max().unwrap();
        let mean = differences.iter().map(|&d| f64::from(d)).sum::<f64>() / differences.len() as f64;
        if most > 0 {
            println!("{name}: differs by at most {most}, {mean:.3} on average");
        }
        if most > good.tolerance {
            failures.push(format!("{name}: differs by up to {most}, allowed are {}", good.tolerance));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn what_is_no_picture_is_refused() {
    for (name, reason) in fixtures().bad {
        let error = decode_file(&path(&name), &DecodeLimits::default()).unwrap_err();
        assert!(matches!(error, Error::Picture { .. } | Error::PictureTooLarge { .. }), "{name}: {error}");
        let message = error.to_string();
        assert!(message.contains(&reason) && message.contains(&name), "{name}: {message}");
    }
}

#[test]
fn a_cut_file_is_an_error_or_the_whole_picture() {
    let limits = DecodeLimits::default();
    for name in fixtures().good.into_keys() {
        let bytes = fs::read(path(&name)).unwrap();
        let whole = decode(&bytes, &name, &limits).unwrap();
        let trails = name.starts_with("trailing");
        // Every length for a few, a sample of them for the others.
        let step =
            if name.contains("palette") || name.starts_with("lossy.") { 1 } else { 1 + bytes.len() / 23 };
        for length in (0..bytes.len()).step_by(step).chain(bytes.len().saturating_sub(8)..bytes.len()) {
            if let Ok(part) = decode(&bytes[..length], &name, &limits) {
                assert_eq!(part, whole, "{name} cut to {length} of {}", bytes.len());
                // A cut JPEG never passes, even where only its end marker is gone.
                assert!(trails || !name.ends_with(".jpg"), "{name} cut to {length} of {}", bytes.len());
            }
        }
    }
}

#[test]
fn limits_are_checked_from_the_header() {
    let bytes = fs::read(path("rgba8.png")).unwrap();
    let limits = DecodeLimits::default();
    assert_eq!(
        (limits.max_bytes, limits.max_pixels, limits.max_memory),
        (33_554_432, 67_108_864, 536_870_912)
    );
    let refused = |limits: &DecodeLimits| match decode(&bytes, "a.png", limits).unwrap_err() {
        Error::PictureTooLarge { name, unit, found, limit } => {
            assert_eq!(name, "a.png");
            (unit, found, limit)
        }
        other => panic!("{other}"),
    };
    let size = bytes.len() as u64;
    let (pixels, memory) = (23 * 17, 23 * 17 * 7);
    assert_eq!(refused(&DecodeLimits { max_bytes: size - 1, ..limits }), ("bytes", size, size - 1));
    assert_eq!(refused(&DecodeLimits { max_pixels: pixels - 1, ..limits }), ("pixels", pixels, pixels - 1));
    assert_eq!(
        refused(&DecodeLimits { max_memory: memory - 1, ..limits }),
        ("bytes of memory", memory, memory - 1)
    );
    // PNG's decoder has its own buffers within the same bound, so exact limits are not tried there.
    let exact = DecodeLimits { max_bytes: size, max_pixels: pixels, ..limits };
    assert!(decode(&bytes, "a.png", &exact).is_ok());

    // Frames larger than their animation's screen: 65535 x 65535 in a GIF, 16383 x 16383 in a WebP.
    let mut gif = fs::read(path("palette.gif")).unwrap();
    let at = gif.windows(5).position(|five| five == [0x2c, 0, 0, 0, 0]).unwrap();
    gif[at + 5..at + 9].fill(0xff);
    let error = decode(&gif, "a.gif", &limits).unwrap_err();
    assert!(matches!(error, Error::PictureTooLarge { unit: "bytes of memory", .. }), "{error}");
    let mut webp = fs::read(path("animated-lossy.webp")).unwrap();
    let at = webp.windows(3).position(|three| three == [0x9d, 0x01, 0x2a]).unwrap();
    webp[at + 3..at + 7].copy_from_slice(&[0xff, 0x3f, 0xff, 0x3f]);
    let error = decode(&webp, "a.webp", &limits).unwrap_err();
    assert!(matches!(error, Error::PictureTooLarge { unit: "bytes of memory", .. }), "{error}");
}

#[test]
fn only_regular_files_of_allowed_size_are_read() {
    let limits = DecodeLimits::default();
    let message = decode_file(Path::new(FOLDER), &limits).unwrap_err().to_string();
    assert!(message.contains("not a regular file"), "{message}");
    assert!(matches!(decode_file(&path("absent.png"), &limits), Err(Error::Read { .. })));
    let dir = tempfile::tempdir().unwrap();
    let sparse = dir.path().join("sparse.png");
    fs::File::create(&sparse).unwrap().set_len(1 << 40).unwrap();
    let error = decode_file(&sparse, &limits).unwrap_err();
    assert!(matches!(error, Error::PictureTooLarge { unit: "bytes", found: 0x100_0000_0000, .. }), "{error}");
}

#[test]
fn the_name_does_not_tell_the_format() {
    let bytes = fs::read(path("rgb8.png")).unwrap();
    assert!(decode(&bytes, "picture.jpg", &DecodeLimits::default()).is_ok());
    let dir = tempfile::tempdir().unwrap();
    let renamed = dir.path().join("picture.gif");
    fs::write(&renamed, &bytes).unwrap();
    assert!(decode_file(&renamed, &DecodeLimits::default()).is_ok());
}

/// Damaged files may decode to anything or fail; they must return.
#[test]
fn damaged_files_do_not_panic() {
    let files: Vec<(String, Vec<u8>)> =
        fixtures().good.into_keys().map(|name| (name.clone(), fs::read(path(&name)).unwrap())).collect();
    let limits = DecodeLimits { max_bytes: 1 << 20, max_pixels: 1 << 16, max_memory: 1 << 20 };
    let rounds = std::env::var("RADAPT_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4000);
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..rounds {
        let (name, bytes) = &files[random.random_range(0..files.len())];
        let mut bytes = bytes.clone();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..5) {
                0 => bytes[at] = random.random(),
                1 => bytes[at] ^= 1 << random.random_range(0..8),
                2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
                // Headers are where the sizes are.
                3 => bytes[random.random_range(0..at.min(64) + 1)] = random.random(),
                _ => {
                    let end = (at + random.random_range(1..9)).min(bytes.len());
                    bytes.drain(at..end);
                    if bytes.is_empty() {
                        bytes.push(0);
                    }
                }
            }
        }
        let _ = decode(&bytes, name, &limits);
    }
}
