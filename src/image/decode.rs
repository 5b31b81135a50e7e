//! Decoding of picture files.
//!
//! Sizes are read from the headers here, before any decoder of the `image` crate is built, and
//! where those decoders are lenient about missing data (JPEG above all) the file's framing is
//! walked first: a cut file is an error, never a half-filled picture.

use std::fmt;
use std::fs::File;
use std::io::{Cursor, ErrorKind, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ::image::codecs::bmp::BmpDecoder;
use ::image::codecs::gif::GifDecoder;
use ::image::codecs::jpeg::JpegDecoder;
use ::image::codecs::png::PngDecoder;
use ::image::codecs::webp::WebPDecoder;
use ::image::metadata::Orientation;
use ::image::{DynamicImage, ImageDecoder, ImageError, Limits, RgbImage};

use crate::error::{Error, Result};

/// The longest side, in pixels, that [`decode`] accepts: what JPEG, GIF and BMP can hold at most.
///
/// Only a PNG can go over it, and then only as a strip that no vision tower can make use of.
pub const MAX_SIDE: u32 = 65_535;

/// How large a picture may be. All three are checked before any pixel buffer is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// The file's size in bytes.
    pub max_bytes: u64,
    /// Width times height of the decoded picture, in pixels.
    pub max_pixels: u64,
    /// Bytes of pixel buffers held at once while decoding, estimated from the header.
    pub max_memory: u64,
}

impl Default for DecodeLimits {
    /// 32 MiB of file, 64 Mi pixels, 512 MiB of memory.
    fn default() -> Self {
        Self { max_bytes: 32 << 20, max_pixels: 64 << 20, max_memory: 512 << 20 }
    }
}

impl DecodeLimits {
    fn check_bytes(&self, name: &str, found: u64) -> Result<()> {
        within(name, "bytes", found, self.max_bytes)
    }

    fn check_pixels(&self, name: &str, width: u32, height: u32) -> Result<()> {
        if width == 0 || height == 0 {
            return Err(picture(name, format!("its size is {width}x{height}, it has no pixels")));
        }
        within(name, "pixels", u64::from(width) * u64::from(height), self.max_pixels)?;
        if width.max(height) > MAX_SIDE {
            return Err(picture(
                name,
                format!("its size is {width}x{height}, a side may have {MAX_SIDE} pixels"),
            ));
        }
        Ok(())
    }

    fn check_memory(&self, name: &str, found: u64) -> Result<()> {
        within(name, "bytes of memory", found, self.max_memory)
    }
}

fn within(name: &str, unit: &'static str, found: u64, limit: u64) -> Result<()> {
    if found > limit {
        return Err(Error::PictureTooLarge { name: name.to_owned(), unit, found, limit });
    }
    Ok(())
}

fn picture(name: &str, reason: impl Into<String>) -> Error {
    Error::Picture { name: name.to_owned(), reason: reason.into() }
}

/// Reads and decodes the picture in a file; see [`decode`].
///
/// # Errors
///
/// As [`decode`]; also when `path` is not a regular file or cannot be read. A file over
/// `limits.max_bytes` is refused by its size, before it is read.
pub fn decode_file(path: &Path, limits: &DecodeLimits) -> Result<RgbImage> {
    let name = path.display().to_string();
    let metadata = std::fs::metadata(path).map_err(|source| Error::read(path, source))?;
    if !metadata.is_file() {
        return Err(picture(&name, "not a regular file"));
    }
    limits.check_bytes(&name, metadata.len())?;
    let file = File::open(path).map_err(|source| Error::read(path, source))?;
    let mut bytes = Vec::new();
    // The file may have grown since; one byte over the limit is enough to see it.
    let mut file = file.take(limits.max_bytes.saturating_add(1));
    file.read_to_end(&mut bytes).map_err(|source| Error::read(path, source))?;
    decode(&bytes, &name, limits)
}

/// Decodes a PNG, JPEG, WebP, BMP or GIF picture (the first frame of an animation) to 8-bit RGB.
///
/// The format is told by the first bytes alone; `name` is used in errors only. The EXIF
/// orientation is applied. Transparency is composited over white and 16-bit samples are brought to
/// 8 bits, both correctly rounded; 16-bit transparency is composited in 16 bits first. Colour
/// profiles and gamma are ignored, as by Pillow.
///
/// Lossless formats are equal to Pillow's `Image.open(...).convert("RGB")` but for transparency,
/// which that drops, and for 16-bit samples, of which that keeps the high byte.
/// Lossy WebP is equal too. JPEG differs by the decoders' own rounding, in levels of 255 on the
/// fixtures in `tests/fixtures/decode` and Pillow 13.0 at most: 1 for grey, RGB, CMYK and YCCK, 2
/// for YCbCr at full resolution, 3 where chroma is subsampled (0.4 on average; 6 on a noisy picture
/// of 12 megapixels).
///
/// # Errors
///
/// [`Error::PictureTooLarge`] over a limit, [`Error::Picture`] for anything that is not a complete
/// picture of a known format: another format, an empty or cut file, no pixels, a side over
/// [`MAX_SIDE`], damaged data as far as the format shows it.
pub fn decode(bytes: &[u8], name: &str, limits: &DecodeLimits) -> Result<RgbImage> {
    let (format, outline) = outline(bytes, name, limits)?;
    let context = Context { name, limits, format, working: outline.working };
    // A panic in a decoder is a bug of its own, but found by this picture: it shall not end more.
    catch_unwind(AssertUnwindSafe(|| context.decode(bytes)))
        .unwrap_or_else(|_| Err(picture(name, format!("{format} data cannot be decoded"))))
}

/// What a picture's header says of it, before anything is decoded: [`measure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// In pixels, before an EXIF orientation is applied.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// The most bytes that [`decode`] holds at once besides the file's own, its result included:
    /// at least what it checks against [`DecodeLimits::max_memory`].
    pub memory: u64,
    /// How often decoding walks over all pixels: the scans of a JPEG, 1 of other formats.
    pub passes: u32,
}

/// Reads a picture's header, so that [`decode`] can be put off until there is room for it.
///
/// # Errors
///
/// As [`decode`] for all that shows before pixels are decoded: the limits, unknown formats, missing
/// ends.
pub fn measure(bytes: &[u8], name: &str, limits: &DecodeLimits) -> Result<Header> {
    let (format, outline) = outline(bytes, name, limits)?;
    let Outline { width, height, passes, .. } = outline;
    let length = bytes.len() as u64;
    // Of one decoded pixel, and how often the decoder copies parts of the file.
    let (pixel, copies) = match format {
        Format::Png => {
            let samples = match bytes.get(25) {
                Some(0) => 2,
                // Transparency may be told in a chunk of its own.
                Some(2 | 3 | 6) => 4,
                _ => 2,
            };
            (samples * if bytes.get(24) == Some(&16) { 2 } else { 1 }, PNG_CHUNKS)
        }
        Format::Jpeg => (outline.channels, 3),
        Format::WebP => (4, 2),
        Format::Bmp | Format::Gif => (4, 1),
    };
    let pixels = area((width, height));
    let decoded = pixels * pixel;
    let memory = decoded.saturating_add(outline.working).max(decoded + 3 * pixels).max(6 * pixels);
    Ok(Header { width, height, memory: memory.saturating_add(copies * (length + 1024)), passes })
}

/// How often the chunks of a PNG may lie in memory: as read, into a buffer that doubles, and as
/// text.
const PNG_CHUNKS: u64 = 4;
/// What a decoder keeps of each chunk or segment, at most, in bytes, besides what it holds. A file
/// may have millions of a few bytes each.
const PART: u64 = 256;
/// The most bytes that the colour profile of a PNG is unpacked to; printers' have 2 MiB.
const MAX_PROFILE: u64 = 8 << 20;
/// The most scans of a JPEG: each walks over all pixels, however few bytes it has. Encoders write
/// about ten.
const MAX_SCANS: u32 = 100;

/// Tells the format and reads the framing, and checks both against the limits.
fn outline(bytes: &[u8], name: &str, limits: &DecodeLimits) -> Result<(Format, Outline)> {
    limits.check_bytes(name, bytes.len() as u64)?;
    let format = Format::of(bytes).ok_or_else(|| picture(name, "not a PNG, JPEG, WebP, BMP or GIF file"))?;
    let cut = || picture(name, format!("{format} data ends within its header"));
    let outline = match format {
        Format::Png => png_outline(bytes).ok_or_else(cut)?,
        Format::Jpeg => jpeg_outline(bytes).ok_or_else(cut)?,
        Format::WebP => webp_outline(bytes).ok_or_else(cut)?,
        Format::Bmp => bmp_outline(bytes).ok_or_else(cut)?,
        Format::Gif => gif_outline(bytes).ok_or_else(cut)?,
    };
    limits.check_pixels(name, outline.width, outline.height)?;
    if let Some(missing) = outline.missing {
        return Err(picture(name, format!("{format} data ends before {missing}")));
    }
    if let Some(wrong) = outline.wrong {
        return Err(picture(name, format!("{format} data has {wrong}")));
    }
    if outline.passes > MAX_SCANS {
        let scans = outline.passes;
        return Err(picture(name, format!("{format} data has {scans} scans, at most {MAX_SCANS} are read")));
    }
    limits.check_memory(name, outline.working)?;
    Ok((format, outline))
}

struct Context<'a> {
    name: &'a str,
    limits: &'a DecodeLimits,
    format: Format,
    working: u64,
}

impl Context<'_> {
    fn decode(&self, bytes: &[u8]) -> Result<RgbImage> {
        let reader = Cursor::new(bytes);
        let failed = |error| failure(self.name, self.format, error);
        match self.format {
            Format::Png => {
                // Bounds what a compressed profile may grow to (one that is larger is passed over)
                // and what texts take; pixels are not counted in it.
                let chunks = self.working + PNG_CHUNKS * (bytes.len() as u64 + 1024);
                let mut within = Limits::no_limits();
                within.max_alloc = Some(self.limits.max_memory.min(chunks));
                self.read(PngDecoder::with_limits(reader, within).map_err(failed)?)
            }
            Format::Jpeg => self.read(JpegDecoder::new(reader).map_err(failed)?),
            Format::WebP => self.read(WebPDecoder::new(reader).map_err(failed)?),
            Format::Bmp => self.read(BmpDecoder::new(reader).map_err(failed)?),
            Format::Gif => self.read(GifDecoder::new(reader).map_err(failed)?),
        }
    }

    fn read(&self, mut decoder: impl ImageDecoder) -> Result<RgbImage> {
        let (width, height) = decoder.dimensions();
        self.limits.check_pixels(self.name, width, height)?;
        // Damaged metadata does not make the pixels unreadable.
        let exif = decoder.exif_metadata().ok().flatten();
        let orientation = exif.as_deref().and_then(orientation).unwrap_or(Orientation::NoTransforms);
        let color = decoder.color_type();
        let pixels = u64::from(width) * u64::from(height);
        let decoded = pixels * u64::from(color.bytes_per_pixel());
        let while_decoding = decoded.saturating_add(self.working);
        let while_converting = if color == ::image::ColorType::Rgb8 { decoded } else { decoded + 3 * pixels };
        let while_turning = if turns(orientation) { 6 * pixels } else { 0 };
        self.limits.check_memory(self.name, while_decoding.max(while_converting).max(while_turning))?;
        let decoded =
            DynamicImage::from_decoder(decoder).map_err(|error| failure(self.name, self.format, error))?;
        let rgb = over_white(decoded).ok_or_else(|| {
            picture(self.name, format!("{} data of type {color:?} is not supported", self.format))
        })?;
        let mut turned = DynamicImage::ImageRgb8(rgb);
        turned.apply_orientation(orientation);
        Ok(turned.into_rgb8())
    }
}

/// Some writers of PNG and WebP keep the prefix of a JPEG's EXIF segment.
fn orientation(exif: &[u8]) -> Option<Orientation> {
    Orientation::from_exif_chunk(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif))
}

fn turns(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH)
}

fn failure(name: &str, format: Format, error: ImageError) -> Error {
    match error {
        ImageError::IoError(error) if error.kind() == ErrorKind::UnexpectedEof => {
            picture(name, format!("{format} data ends before the picture does"))
        }
        error => picture(name, format!("{format} data cannot be decoded: {error}")),
    }
}

#[derive(Debug, Clone, Copy)]
enum Format {
    Png,
    Jpeg,
    WebP,
    Bmp,
    Gif,
}

impl Format {
    fn of(bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            Some(Self::Png)
        } else if bytes.starts_with(b"\xff\xd8\xff") {
            Some(Self::Jpeg)
        } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            Some(Self::WebP)
        } else if bytes.starts_with(b"BM") {
            Some(Self::Bmp)
        } else if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") {
            Some(Self::Gif)
        } else {
            None
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::WebP => "webp",
            Self::Bmp => "bmp",
            Self::Gif => "gif",
        })
    }
}

/// What the framing of a file says about its picture.
struct Outline {
    width: u32,
    height: u32,
    /// Bytes the decoder holds besides its output.
    working: u64,
    /// Of the decoded picture, where the outline tells; 4 otherwise.
    channels: u64,
    /// How often decoding walks over all pixels.
    passes: u32,
    /// What the file should have and ends before.
    missing: Option<&'static str>,
    /// What it has and may not have.
    wrong: Option<&'static str>,
}

impl Outline {
    fn new((width, height): (u32, u32)) -> Self {
        Self { width, height, working: 0, channels: 4, passes: 1, missing: None, wrong: None }
    }
}

fn u16_be(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u32_be(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u16_le(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u24_le(bytes: &[u8], at: usize) -> Option<u32> {
    let [a, b, c] = bytes.get(at..)?.first_chunk().copied()?;
    Some(u32::from_le_bytes([a, b, c, 0]))
}

fn u32_le(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// The IHDR chunk follows the signature; a compressed profile comes before the pixels.
fn png_outline(bytes: &[u8]) -> Option<Outline> {
    let mut outline = Outline::new((u32_be(bytes, 16)?, u32_be(bytes, 20)?));
    let mut at = 8_usize;
    while let (Some(length), Some(tag)) = (u32_be(bytes, at), bytes.get(at + 4..at + 8)) {
        outline.working += PART;
        match tag {
            b"IDAT" => break,
            // Deflate makes at most 1032 bytes of one.
            // The png crate up to 0.18.1 panics on these (image-png#694).
            b"PLTE" if length % 3 != 0 => outline.wrong = Some("a palette that is not of whole colours"),
            b"iCCP" => outline.working += MAX_PROFILE.min(1032 * u64::from(length)),
            _ => {}
        }
        let Some(next) = at.checked_add(12).and_then(|a| a.checked_add(length as usize)) else { break };
        at = next;
    }
    Some(outline)
}

/// Both header families keep the size at offset 18; only the oldest one in 16 bits.
fn bmp_outline(bytes: &[u8]) -> Option<Outline> {
    let size = if u32_le(bytes, 14)? == 12 {
        (u32::from(u16_le(bytes, 18)?), u32::from(u16_le(bytes, 20)?))
    } else {
        // A negative height means rows from the top; a negative width is refused by its size.
        (u32_le(bytes, 18)?, u32_le(bytes, 22)?.cast_signed().unsigned_abs())
    };
    Some(Outline::new(size))
}

/// Walks the marker segments and entropy-coded data to the end-of-image marker.
///
/// The decoder fills what a cut file lacks with grey. Segments are skipped by their length, so the
/// markers of a thumbnail inside an EXIF segment are not seen; what follows the end of the image
/// is not looked at.
fn jpeg_outline(bytes: &[u8]) -> Option<Outline> {
    const END: u8 = 0xd9;
    const SCAN: u8 = 0xda;
    let mut frame: Option<(u32, u32, u64)> = None;
    // A second frame header is an error, but not all decoders say so.
    let mut samples = 0_u64;
    let (mut whole, mut buffered, mut scans, mut parts) = (false, false, 0_usize, 0_u64);
    let mut at = 2;
    while let Some(&[mark, code]) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        // Entropy-coded bytes, a stuffed 0xff, or a fill byte before a marker.
        if mark != 0xff || matches!(code, 0x00 | 0xff) {
            at += 1;
            continue;
        }
        at += 2;
        match code {
            END => {
                whole = true;
                break;
            }
            // TEM, restarts and a repeated start of image stand alone.
            0x01 | 0xd0..=0xd8 => continue,
            0xc0..=0xcf if !matches!(code, 0xc4 | 0xc8 | 0xcc) => {
                let (height, width) = (u16_be(bytes, at + 3)?, u16_be(bytes, at + 5)?);
                let components = u64::from(*bytes.get(at + 7)?);
                frame = frame.or(Some((width.into(), height.into(), components)));
                samples = samples.max(area((width.into(), height.into())) * components);
                // Progressive frames are collected as coefficients before any pixel is made.
                buffered |= !matches!(code, 0xc0 | 0xc1);
            }
            SCAN => scans += 1,
            _ => {}
        }
        let Some(length) = u16_be(bytes, at) else { break };
        at += usize::from(length);
        parts += 1;
    }
    let (width, height, components) = frame?;
    Some(Outline {
        working: PART * parts + if buffered || scans > 1 { 2 * samples } else { 0 },
        // CMYK becomes RGB.
        channels: if components == 1 { 1 } else { 3 },
        passes: u32::try_from(scans.max(1)).unwrap_or(u32::MAX),
        missing: (!whole).then_some("its end-of-image marker"),
        ..Outline::new((width, height))
    })
}

/// Walks the blocks before the first frame, and that frame's data.
fn gif_outline(bytes: &[u8]) -> Option<Outline> {
    const EXTENSION: u8 = 0x21;
    const FRAME: u8 = 0x2c;
    let (width, height) = (u32::from(u16_le(bytes, 6)?), u32::from(u16_le(bytes, 8)?));
    let mut outline =
        Outline { missing: Some("its first frame is complete"), ..Outline::new((width, height)) };
    let mut at = 13 + color_table(*bytes.get(10)?);
    loop {
        match bytes.get(at) {
            Some(&EXTENSION) => at += 2,
            Some(&FRAME) => {
                let Some(packed) = bytes.get(at + 9) else { return Some(outline) };
                let (w, h) = (u16_le(bytes, at + 5)?, u16_le(bytes, at + 7)?);
                // A frame that does not fill the screen is decoded aside, as RGBA.
                if (u32::from(w), u32::from(h)) != (width, height) {
                    outline.working = 4 * u64::from(w) * u64::from(h);
                }
                at += 10 + color_table(*packed) + 1;
                if after_blocks(bytes, at).is_some() {
                    outline.missing = None;
                }
                return Some(outline);
            }
            // The trailer, or damage: the decoder says which.
            Some(_) => return Some(Outline { missing: None, ..outline }),
            None => return Some(outline),
        }
        match after_blocks(bytes, at) {
            Some(next) => at = next,
            None => return Some(outline),
        }
    }
}

/// The bytes of the colour table that a GIF's packed field announces.
fn color_table(packed: u8) -> usize {
    if packed & 0x80 == 0 { 0 } else { 3 << ((packed & 7) + 1) }
}

/// Where a chain of GIF sub-blocks that starts at `at` ends.
fn after_blocks(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length => at += 1 + usize::from(length),
        }
    }
}

/// Walks the RIFF chunks. Frames carry sizes of their own that the decoder allocates by.
fn webp_outline(bytes: &[u8]) -> Option<Outline> {
    let end = usize::try_from(u32_le(bytes, 4)?).ok()?.checked_add(8)?;
    let mut size: Option<(u32, u32)> = None;
    let (mut working, mut animated) = (0_u64, false);
    let mut missing = (end > bytes.len()).then_some("its last chunk does");
    let mut at = 12;
    while let Some(tag) = bytes.get(at..at + 4) {
        let Some(length) = u32_le(bytes, at + 4) else { break };
        let length = usize::try_from(length).ok()?;
        let body = at + 8;
        working += PART;
        let found = match tag {
            b"VP8X" => Some((u24_le(bytes, body + 4)? + 1, u24_le(bytes, body + 7)? + 1)),
            b"VP8 " => {
                let found = (u16_le(bytes, body + 6)? & 0x3fff, u16_le(bytes, body + 8)? & 0x3fff);
                let found = (u32::from(found.0), u32::from(found.1));
                // Luma and two quarter planes of chroma; an RGBA copy when it is one of many.
                working += area(found) * if animated { 6 } else { 2 };
                Some(found)
            }
            b"VP8L" => {
                let bits = u32_le(bytes, body + 1)?;
                let found = ((bits & 0x3fff) + 1, ((bits >> 14) & 0x3fff) + 1);
                working += area(found) * 4;
                Some(found)
            }
            // A plane, and the RGBA picture that it is packed in.
            b"ALPH" => {
                working += size.map_or(0, area) * 5;
                None
            }
            // Only the first frame is decoded; its chunks follow its own header.
            b"ANMF" if !animated => {
                animated = true;
                working += size.map_or(0, area) * 4;
                at = body + 16;
                continue;
            }
            b"ANMF" => break,
            _ => None,
        };
        size = size.or(found);
        if body.checked_add(length)? > bytes.len() {
            // What follows the last chunk is not the picture's.
            missing = missing.or((at < end).then_some("its last chunk does"));
            break;
        }
        at = body + length + (length & 1);
    }
    Some(Outline { working, missing, ..Outline::new(size?) })
}

fn area((width, height): (u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

/// 8-bit RGB of a decoded picture, composited over white; `None` for sample types that the five
/// formats do not have.
fn over_white(decoded: DynamicImage) -> Option<RgbImage> {
    fn map<const N: usize, S: Copy>(
        width: u32,
        height: u32,
        samples: &[S],
        to_rgb: impl Fn([S; N]) -> [u8; 3],
    ) -> Option<RgbImage> {
        let (pixels, _) = samples.as_chunks::<N>();
        RgbImage::from_raw(width, height, pixels.iter().flat_map(|&pixel| to_rgb(pixel)).collect())
    }
    let (width, height) = (decoded.width(), decoded.height());
    match decoded {
        DynamicImage::ImageRgb8(rgb) => Some(rgb),
        DynamicImage::ImageLuma8(from) => map(width, height, &from, |[l]| [l; 3]),
        DynamicImage::ImageLumaA8(from) => map(width, height, &from, |[l, a]| [over8(l, a); 3]),
        DynamicImage::ImageRgba8(from) => {
            map(width, height, &from, |[r, g, b, a]| [r, g, b].map(|c| over8(c, a)))
        }
        DynamicImage::ImageLuma16(from) => map(width, height, &from, |[l]| [narrow(l); 3]),
        DynamicImage::ImageLumaA16(from) => map(width, height, &from, |[l, a]| [narrow(over16(l, a)); 3]),
        DynamicImage::ImageRgb16(from) => map(width, height, &from, |rgb: [u16; 3]| rgb.map(narrow)),
        DynamicImage::ImageRgba16(from) => {
            map(width, height, &from, |[r, g, b, a]| [r, g, b].map(|c| narrow(over16(c, a))))
        }
        _ => None,
    }
}

/// A sample over white, rounded; 255 is odd, so there are no ties.
fn over8(sample: u8, alpha: u8) -> u8 {
    let (sample, alpha) = (u16::from(sample), u16::from(alpha));
    ((sample * alpha + 255 * (255 - alpha) + 127) / 255) as u8
}

/// As [`over8`], in 16 bits.
fn over16(sample: u16, alpha: u16) -> u16 {
    let (sample, alpha) = (u32::from(sample), u32::from(alpha));
    ((sample * alpha + 65_535 * (65_535 - alpha) + 32_767) / 65_535) as u16
}

/// The nearest 8-bit sample: 65535 is 255 times 257.
fn narrow(sample: u16) -> u8 {
    ((u32::from(sample) + 128) / 257) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compositing_is_correctly_rounded() {
        for sample in 0..=255_u8 {
            for alpha in 0..=255_u8 {
                let a = f64::from(alpha) / 255.0;
                let exact = f64::from(sample) * a + 255.0 * (1.0 - a);
                assert_eq!(f64::from(over8(sample, alpha)), (exact + 1e-9).round(), "{sample} {alpha}");
            }
        }
        for sample in (0..=u16::MAX).step_by(251) {
            for alpha in (0..=u16::MAX).step_by(257) {
                let a = f64::from(alpha) / 65_535.0;
                let exact = f64::from(sample) * a + 65_535.0 * (1.0 - a);
                assert_eq!(f64::from(over16(sample, alpha)), (exact + 1e-7).round(), "{sample} {alpha}");
            }
        }
        for sample in 0..=u16::MAX {
            assert_eq!(f64::from(narrow(sample)), (f64::from(sample) / 257.0).round());
        }
    }
}
