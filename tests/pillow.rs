//! Resizing and the image contracts against Pillow and transformers, byte for byte.
//!
//! `tests/fixtures/pillow/make.py` writes what they made of the pictures that `picture` makes.

use std::fs;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use radapt::Error;
use radapt::image::{
    Contract, Filter, Preprocess, Scale, pixels_from_rgb, resize, resize_matrix, rgb_from_pixels,
};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pillow/cases.json");

#[derive(Deserialize)]
struct Cases {
    resize: Vec<Resize>,
    contracts: Vec<Prepared>,
}

#[derive(Deserialize)]
struct Resize {
    kind: String,
    size: [u32; 2],
    out: [u32; 2],
    filter: String,
    #[serde(flatten)]
    expected: Expected,
}

#[derive(Deserialize)]
struct Prepared {
    contract: Contract,
    config: Value,
    size: [u32; 2],
    out: [u32; 2],
    #[serde(flatten)]
    expected: Expected,
}

#[derive(Deserialize)]
struct Expected {
    sha256: String,
    hex: Option<String>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Expected {
    /// How `found` differs, if it does.
    fn differs(&self, found: &RgbImage) -> Option<String> {
        if hex(&Sha256::digest(found.as_raw())) == self.sha256 {
            return None;
        }
        let Some(expected) = &self.hex else { return Some("its hash differs".into()) };
        let expected: Vec<u8> = (0..expected.len() / 2)
            .map(|at| u8::from_str_radix(&expected[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        let differences: Vec<u8> = found.iter().zip(&expected).map(|(&a, &b)| a.abs_diff(b)).collect();
        let (count, most) =
            (differences.iter().filter(|&&d| d != 0).count(), differences.iter().max().unwrap());
        Some(format!("{count} of {} bytes differ, by at most {most}", differences.len()))
    }
}

/// The pictures of make.py.
fn picture(kind: &str, width: u32, height: u32) -> RgbImage {
    let noise = |index: u32| {
        let v = index.wrapping_add(width * 31 + height);
        let v = (v ^ (v >> 16)).wrapping_mul(0x7feb_352d);
        let v = (v ^ (v >> 15)).wrapping_mul(0x846c_a68b);
        ((v ^ (v >> 16)) >> 24) as u8
    };
    RgbImage::from_fn(width, height, |x, y| {
        let index = (y * width + x) * 3;
        let (across, down) = (x * 255 / (width - 1).max(1), y * 255 / (height - 1).max(1));
        image::Rgb(match kind {
            "gradient" => [across as u8, down as u8, ((across + down) / 2) as u8],
            "noise" => [noise(index), noise(index + 1), noise(index + 2)],
            "extremes" => [0, 1, 2].map(|c| if noise(index + c) < 128 { 0 } else { 255 }),
            other => panic!("no picture `{other}`"),
        })
    })
}

fn cases() -> Cases {
    serde_json::from_str(&fs::read_to_string(CASES).unwrap()).unwrap()
}

fn folder(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("preprocessor_config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn resize_equals_pillow() {
    let cases = cases().resize;
    assert!(cases.len() >= 40);
    let mut failures = Vec::new();
    for Resize { kind, size: [w, h], out: [ow, oh], filter, expected } in &cases {
        let code = if filter == "bicubic" { Filter::Bicubic } else { Filter::Bilinear };
        let found = resize(&picture(kind, *w, *h), *ow, *oh, code);
        assert_eq!(found.dimensions(), (*ow, *oh));
        if let Some(difference) = expected.differs(&found) {
            failures.push(format!("{kind} {w}x{h} to {ow}x{oh} {filter}: {difference}"));
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn contracts_equal_transformers() {
    let cases = cases().contracts;
    let mut failures = Vec::new();
    for Prepared { contract, config, size: [w, h], out, expected } in &cases {
        let dir = folder(config);
        let preprocess = Preprocess::from_folder(dir.path(), 224, Some(*contract), Contract::Clip).unwrap();
        let found = preprocess.prepare(&picture("noise", *w, *h));
        assert_eq!([found.width(), found.height()], *out);
        if let Some(difference) = expected.differs(&found) {
            failures.push(format!("{contract} {w}x{h} {config}: {difference}"));
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn the_matrix_is_what_resize_applies() {
    let image = picture("noise", 41, 29);
    for (width, height) in [(17, 29), (41, 12), (80, 29), (41, 90)] {
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            let found = resize(&image, width, height, filter);
            let columns = resize_matrix(41, width as usize, filter);
            let rows = resize_matrix(29, height as usize, filter);
            for (x, y, pixel) in found.enumerate_pixels() {
                let (column, row) = (&columns[x as usize], &rows[y as usize]);
                for channel in 0..3 {
                    let mut sum = 0.0;
                    for (j, wy) in (row.start..).zip(&row.weights) {
                        for (i, wx) in (column.start..).zip(&column.weights) {
                            sum += wy * wx * f64::from(image.get_pixel(i as u32, j as u32)[channel]);
                        }
                    }
                    // One axis is unchanged, so that there is one rounding.
                    assert!((sum.clamp(0.0, 255.0) - f64::from(pixel[channel])).abs() < 0.501);
                }
            }
        }
    }
}

#[test]
fn long_pictures_need_no_more_memory_than_they_have() {
    let preprocess = Preprocess::clip(336, Contract::Clip);
    for contract in Contract::ALL {
        let preprocess = Preprocess { contract, ..preprocess.clone() };
        for (width, height) in [(1, 65_535), (65_535, 1), (65_535, 40)] {
            let mut image = RgbImage::from_pixel(width, height, image::Rgb([9, 99, 199]));
            image.put_pixel(0, 0, image::Rgb([255; 3]));
            assert_eq!(preprocess.prepare(&image).dimensions(), (336, 336));
        }
    }
    assert_eq!(preprocess.prepare(&RgbImage::new(0, 0)), RgbImage::new(336, 336));
}

#[test]
fn names_are_parsed_and_listed() {
    for contract in Contract::ALL {
        assert_eq!(contract.to_string().parse::<Contract>().unwrap(), contract);
        assert_eq!(serde_json::to_value(contract).unwrap(), json!(contract.name()));
        assert_eq!(serde_json::from_value::<Contract>(json!(contract.name())).unwrap(), contract);
    }
    let message = "pad".parse::<Contract>().unwrap_err().to_string();
    assert!(
        message.contains("clip, llava-pad, llava-crop, squash") && message.contains("`pad`"),
        "{message}"
    );
    assert!(serde_json::from_value::<Contract>(json!("Clip")).is_err());
}

#[test]
fn folders_are_read() {
    let read = |config: Value, contract, default| {
        Preprocess::from_folder(folder(&config).path(), 28, contract, default).unwrap()
    };
    let empty = tempfile::tempdir().unwrap();
    let bare = Preprocess::from_folder(empty.path(), 28, None, Contract::Squash).unwrap();
    assert_eq!(bare, Preprocess::clip(28, Contract::Squash));
    assert_eq!(bare.mean, [0.481_454_66, 0.457_827_5, 0.408_210_73]);
    assert_eq!(bare.std, [0.268_629_54, 0.261_302_6, 0.275_777_1]);
    assert_eq!(bare.background, [122, 116, 104]);
    assert_eq!(read(json!({"do_resize": true, "size": null, "other": [1]}), None, Contract::Squash), bare);

    let padded =
        json!({"do_pad": true, "size": {"shortest_edge": 30}, "rescale_factor": 0.00392156862745098});
    assert_eq!(read(padded.clone(), None, Contract::Clip).contract, Contract::LlavaPad);
    assert_eq!(read(padded.clone(), Some(Contract::Clip), Contract::Squash).contract, Contract::Clip);
    assert_eq!(read(json!({"do_pad": false}), None, Contract::LlavaPad).contract, Contract::LlavaPad);
    let found = read(padded, None, Contract::Clip);
    assert_eq!((found.width, found.height, found.scale), (30, 30, Scale::ShortestEdge(30)));

    let found = read(
        json!({"size": {"height": 20, "width": 40}, "resample": 2, "image_mean": [0, 0.5, 2], "image_std": [1, 1, 1]}),
        None,
        Contract::Clip,
    );
    assert_eq!((found.width, found.height, found.filter), (40, 20, Filter::Bilinear));
    assert_eq!((found.mean, found.background), ([0.0, 0.5, 2.0], [0, 127, 255]));

    // Newer models nest it; the older file comes first.
    let dir = tempfile::tempdir().unwrap();
    let nested = json!({"image_processor": {"crop_size": 14, "size": 16}, "size": 99, "processor_class": "LlavaProcessor"});
    fs::write(dir.path().join("processor_config.json"), nested.to_string()).unwrap();
    let found = Preprocess::from_folder(dir.path(), 28, None, Contract::Clip).unwrap();
    assert_eq!((found.width, found.height, found.scale), (14, 14, Scale::ShortestEdge(16)));
    fs::write(dir.path().join("processor_config.json"), json!({"size": 21}).to_string()).unwrap();
    assert_eq!(Preprocess::from_folder(dir.path(), 28, None, Contract::Clip).unwrap().width, 21);
    fs::write(dir.path().join("preprocessor_config.json"), json!({"size": 22}).to_string()).unwrap();
    assert_eq!(Preprocess::from_folder(dir.path(), 28, None, Contract::Clip).unwrap().width, 22);
}

#[test]
fn wrong_configurations_name_the_file_and_the_key() {
    let wrong = [
        ("do_resize", json!(false)),
        ("do_center_crop", json!(false)),
        ("do_normalize", json!(false)),
        ("do_rescale", json!(false)),
        ("do_pad", json!("yes")),
        ("rescale_factor", json!(1.0)),
        ("rescale_factor", json!("1/255")),
        ("resample", json!(1)),
        ("resample", json!("bicubic")),
        ("size", json!("large")),
        ("size", json!(0)),
        ("size", json!(-3)),
        ("size", json!(336.5)),
        ("size", json!(1_000_000_000_000_u64)),
        ("size", json!({"longest_edge": 224})),
        ("size", json!({"shortest_edge": 224, "longest_edge": 500})),
        ("size", json!({"height": 224})),
        ("size", json!([224, 224])),
        ("crop_size", json!({"shortest_edge": 224})),
        ("crop_size", json!({"height": 0, "width": 224})),
        ("image_mean", json!([0.5, 0.5])),
        ("image_mean", json!([0.5, 0.5, 0.5, 0.5])),
        ("image_mean", json!([0.5, "x", 0.5, 0.5])),
        ("image_mean", json!(0.5)),
        ("image_mean", json!([0.5, 0.5, 1e300])),
        ("image_std", json!([0.5, 0.0, 0.5])),
        ("image_std", json!([0.5, 1e-300, 0.5])),
        ("image_std", json!({})),
    ];
    for (key, value) in wrong {
        let dir = folder(&json!({ key: value }));
        let error = Preprocess::from_folder(dir.path(), 224, None, Contract::Clip).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Config { .. }), "{message}");
        assert!(
            message.contains("preprocessor_config.json") && message.contains(&format!("`{key}`")),
            "{message}"
        );
    }
    for text in ["", "[]", "{", "\"size\""] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("preprocessor_config.json"), text).unwrap();
        let error = Preprocess::from_folder(dir.path(), 224, None, Contract::Clip).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(Preprocess::from_folder(dir.path(), 0, None, Contract::Clip).is_err());
    fs::create_dir(dir.path().join("preprocessor_config.json")).unwrap();
    let error = Preprocess::from_folder(dir.path(), 224, None, Contract::Clip).unwrap_err();
    assert!(matches!(error, Error::Read { .. }), "{error}");
}

#[test]
fn pixels_are_planes_in_0_to_1() {
    let device = Device::Cpu;
    let image = picture("noise", 16, 16);
    let pixels = pixels_from_rgb(&image, &device).unwrap();
    assert_eq!((pixels.dims(), pixels.dtype()), (&[3, 16, 16][..], DType::F32));
    let values = pixels.to_vec3::<f32>().unwrap();
    for (x, y, pixel) in image.enumerate_pixels() {
        for channel in 0..3 {
            assert_eq!(values[channel][y as usize][x as usize], f32::from(pixel[channel]) / 255.0);
        }
    }
    assert_eq!(rgb_from_pixels(&pixels).unwrap(), image);

    let preprocess = Preprocess::clip(14, Contract::LlavaPad);
    let images = [picture("noise", 20, 30), picture("gradient", 31, 9)];
    let batch = preprocess.batch(&images, &device).unwrap();
    assert_eq!(batch.dims(), [2, 3, 14, 14]);
    for (index, image) in images.iter().enumerate() {
        let one = rgb_from_pixels(&batch.get(index).unwrap()).unwrap();
        assert_eq!(one, preprocess.prepare(image));
    }
    assert!(preprocess.batch(&[], &device).is_err());
}

#[test]
fn tensors_are_rounded_and_clamped() {
    let device = Device::Cpu;
    // 0.5 and 1.5 after scaling go to the even neighbour.
    let values = [0.5 / 255.0, 1.5 / 255.0, -1.0, 2.0, f32::INFINITY, 0.999];
    let pixels = Tensor::new(&values, &device).unwrap().reshape((3, 1, 2)).unwrap();
    assert_eq!(rgb_from_pixels(&pixels).unwrap().into_raw(), [0, 0, 255, 2, 255, 255]);
    assert!(rgb_from_pixels(&Tensor::zeros((4, 2, 2), DType::F32, &device).unwrap()).is_err());
    assert!(rgb_from_pixels(&Tensor::zeros((3, 2, 2), DType::F64, &device).unwrap()).is_err());
    assert!(rgb_from_pixels(&Tensor::zeros((1, 3, 2, 2), DType::F32, &device).unwrap()).is_err());
    assert!(rgb_from_pixels(&Tensor::full(f32::NAN, (3, 1, 1), &device).unwrap()).is_err());
}
