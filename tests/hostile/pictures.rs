//! Hostile pictures, made here byte by byte.

use std::io::Cursor;

use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};

/// Noise, so that files are long enough to be cut at many places.
pub fn noise(width: u32, height: u32) -> RgbImage {
    let mut state = 1_u32;
    RgbImage::from_fn(width, height, |_, _| {
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        image::Rgb([byte(), byte(), byte()])
    })
}

pub fn encode(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A picture of each format that is taken.
pub fn good() -> Vec<(&'static str, Vec<u8>)> {
    let picture = noise(48, 40);
    [
        ("png", ImageFormat::Png),
        ("jpeg", ImageFormat::Jpeg),
        ("webp", ImageFormat::WebP),
        ("bmp", ImageFormat::Bmp),
        ("gif", ImageFormat::Gif),
    ]
    .map(|(name, format)| (name, encode(picture.clone(), format)))
    .into()
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

fn adler(bytes: &[u8]) -> u32 {
    let (a, b) = bytes.iter().fold((1_u32, 0_u32), |(a, b), &byte| {
        let a = (a + u32::from(byte)) % 65_521;
        (a, (b + a) % 65_521)
    });
    b << 16 | a
}

/// Deflate without compression.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut blocks = bytes.chunks(65_535).peekable();
    while let Some(block) = blocks.next() {
        out.push(u8::from(blocks.peek().is_none()));
        let length = block.len() as u16;
        out.extend(length.to_le_bytes());
        out.extend((!length).to_le_bytes());
        out.extend(block);
    }
    out
}

pub fn zlib(bytes: &[u8]) -> Vec<u8> {
    [&[0x78, 0x01][..], &stored(bytes), &adler(bytes).to_be_bytes()].concat()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let end = [crc(bytes).to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat();
    [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3][..], &stored(bytes), &end].concat()
}

pub fn chunk(tag: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let tagged = [&tag[..], body].concat();
    [&(body.len() as u32).to_be_bytes()[..], &tagged, &crc(&tagged).to_be_bytes()].concat()
}

/// A PNG of 8-bit samples (colour type 0 grey, 2 RGB, 3 palette, 6 RGBA) with these chunks
/// between header and end.
pub fn png(width: u32, height: u32, color: u8, chunks: &[Vec<u8>]) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, color, 0, 0, 0]].concat();
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunks.concat(), chunk(b"IEND", &[])].concat()
}

/// The zlib stream of about so many MiB of zeros, as an encoder made it.
pub fn zeros(mib: u32) -> Vec<u8> {
    let file = encode(GrayImage::new(1 << 10, mib << 10), ImageFormat::Png);
    let mut stream = Vec::new();
    let mut at = 8;
    while at < file.len() {
        let length = u32::from_be_bytes(file[at..at + 4].try_into().unwrap()) as usize;
        if &file[at + 4..at + 8] == b"IDAT" {
            stream.extend(&file[at + 8..at + 8 + length]);
        }
        at += 12 + length;
    }
    stream
}

pub fn profile(stream: &[u8]) -> Vec<u8> {
    chunk(b"iCCP", &[b"bomb\0\0", stream].concat())
}

/// The one row of a grey PNG of one pixel.
pub fn dot() -> Vec<u8> {
    chunk(b"IDAT", &zlib(&[0, 128]))
}

pub fn gif(screen: (u16, u16), frame: (u16, u16), frames: usize) -> Vec<u8> {
    let mut out = b"GIF89a".to_vec();
    out.extend([screen.0.to_le_bytes(), screen.1.to_le_bytes()].concat());
    // Two colours.
    out.extend([0x80, 0, 0, 0, 0, 0, 255, 255, 255]);
    for _ in 0..frames {
        out.extend([0x2c, 0, 0, 0, 0]);
        out.extend([frame.0.to_le_bytes(), frame.1.to_le_bytes()].concat());
        // Clear, pixel 0, end.
        out.extend([0, 2, 2, 0x44, 0x01, 0]);
    }
    out.push(0x3b);
    out
}

fn riff(chunks: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut body = b"WEBP".to_vec();
    for (tag, data) in chunks {
        body.extend(*tag);
        body.extend((data.len() as u32).to_le_bytes());
        body.extend(data);
        body.extend(vec![0; data.len() % 2]);
    }
    [b"RIFF".to_vec(), (body.len() as u32).to_le_bytes().to_vec(), body].concat()
}

fn u24(value: u32) -> Vec<u8> {
    value.to_le_bytes()[..3].to_vec()
}

pub fn webp_extended(width: u32, height: u32) -> Vec<u8> {
    riff(&[(b"VP8X", [vec![0; 4], u24(width - 1), u24(height - 1)].concat())])
}

pub fn webp_lossless(width: u32, height: u32) -> Vec<u8> {
    let bits = (width - 1) | (height - 1) << 14;
    riff(&[(b"VP8L", [vec![0x2f], bits.to_le_bytes().to_vec(), vec![0; 32]].concat())])
}

pub fn webp_lossy(width: u16, height: u16) -> Vec<u8> {
    let size = [width.to_le_bytes(), height.to_le_bytes()].concat();
    riff(&[(b"VP8 ", [vec![0x10, 0, 0, 0x9d, 0x01, 0x2a], size, vec![0; 64]].concat())])
}

/// A screen of one pixel, and a frame far larger.
pub fn webp_large_frame() -> Vec<u8> {
    let lossless = {
        let bits = 16_382_u32 | 16_382 << 14;
        [
            b"VP8L".to_vec(),
            37_u32.to_le_bytes().to_vec(),
            vec![0x2f],
            bits.to_le_bytes().to_vec(),
            vec![0; 33],
        ]
        .concat()
    };
    riff(&[
        (b"VP8X", [vec![2, 0, 0, 0], u24(0), u24(0)].concat()),
        (b"ANIM", vec![0; 6]),
        (b"ANMF", [u24(0), u24(0), u24(0), u24(0), u24(1), vec![0], lossless].concat()),
    ])
}

/// A frame of one pixel among chunks of unknown kinds.
pub fn webp_of_chunks(count: u32) -> Vec<u8> {
    let mut frame = [u24(0), u24(0), u24(0), u24(0), u24(1), vec![0]].concat();
    frame.extend((0..count).flat_map(|kind| [(kind | 0x8000_0000).to_le_bytes(), [0; 4]].concat()));
    riff(&[(b"VP8X", [vec![2, 0, 0, 0], u24(0), u24(0)].concat()), (b"ANIM", vec![0; 6]), (b"ANMF", frame)])
}

/// A JPEG's header: the frame marker (0xc0 baseline, 0xc2 progressive), its size, and scans without
/// data.
pub fn jpeg(marker: u8, width: u16, height: u16, components: u8, scans: usize) -> Vec<u8> {
    let mut out = vec![0xff, 0xd8];
    out.extend([0xff, 0xdb, 0, 67, 0]);
    out.extend([1; 64]);
    let length = 8 + 3 * u16::from(components);
    out.extend([0xff, marker]);
    out.extend(length.to_be_bytes());
    out.push(8);
    out.extend([height.to_be_bytes(), width.to_be_bytes()].concat());
    out.push(components);
    for i in 0..components {
        out.extend([i + 1, 0x11, 0]);
    }
    // A code of one bit for 0, for either class.
    for class in [0x00, 0x10] {
        out.extend([0xff, 0xc4, 0, 20, class, 1]);
        out.extend([0; 16]);
    }
    for _ in 0..scans {
        out.extend([0xff, 0xda, 0, 8, 1, 1, 0, 0, 0, 0]);
        out.extend([0; 4]);
    }
    out.extend([0xff, 0xd9]);
    out
}

pub fn bmp(width: i32, height: i32, bits: u16, compression: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"BM".to_vec();
    out.extend((54 + data.len() as u32).to_le_bytes());
    out.extend([0; 4]);
    out.extend(54_u32.to_le_bytes());
    out.extend(40_u32.to_le_bytes());
    out.extend(width.to_le_bytes());
    out.extend(height.to_le_bytes());
    out.extend(1_u16.to_le_bytes());
    out.extend(bits.to_le_bytes());
    out.extend(compression.to_le_bytes());
    out.extend([0; 20]);
    out.extend(data);
    out
}
