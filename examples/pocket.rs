//! Draws a sheet of the pocket world: `cargo run --release --example pocket -- sheet.png`.

use image::{RgbImage, imageops};
use radapt::pocket::{KINDS, Split, draw};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().unwrap_or_else(|| "pocket.png".into());
    let size: u32 = args.next().map_or(Ok(96), |s| s.parse())?;
    let rows: u32 = args.next().map_or(Ok(2), |s| s.parse())?;
    let columns = KINDS.len() as u32 / 2;
    let mut sheet = RgbImage::new(columns * size, 2 * rows * size);
    let mut seen = [0u32; KINDS.len()];
    let mut index = 0;
    while seen.iter().any(|&n| n < rows) {
        let scene = draw(Split::Validation, 1, index, size)?;
        index += 1;
        let n = &mut seen[scene.kind];
        if *n < rows {
            let (column, row) = (scene.kind as u32 % columns, scene.kind as u32 / columns * rows + *n);
            imageops::replace(&mut sheet, &scene.picture, i64::from(column * size), i64::from(row * size));
            *n += 1;
        }
    }
    sheet.save(&path)?;
    for index in 0..3 {
        let scene = draw(Split::Train, 0, index, size)?;
        println!("{}", scene.caption);
    }
    let start = std::time::Instant::now();
    for index in 0..1000 {
        std::hint::black_box(draw(Split::Train, 0, index, size)?);
    }
    println!("{:.3} ms a picture of {size} pixels", start.elapsed().as_secs_f64());
    Ok(())
}
