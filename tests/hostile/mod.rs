//! Hostile inputs of a server that takes pictures, each with the reason it is refused for.
#![allow(dead_code, reason = "each test file uses a part of this")]

pub mod pictures;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
use radapt::image::DecodeLimits;
use radapt::server::intake::Refusal;

/// Small ones, so that bombs need not be large.
pub const LIMITS: DecodeLimits =
    DecodeLimits { max_bytes: 1 << 20, max_pixels: 1 << 20, max_memory: 8 << 20 };

pub fn data_url(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

pub enum Input {
    Url(String),
    Bytes(Vec<u8>),
}

pub struct Case {
    pub name: String,
    pub input: Input,
    pub expected: Refusal,
}

pub fn url(name: impl Into<String>, url: impl Into<String>, expected: Refusal) -> Case {
    Case { name: name.into(), input: Input::Url(url.into()), expected }
}

pub fn bytes(name: impl Into<String>, bytes: Vec<u8>, expected: Refusal) -> Case {
    Case { name: name.into(), input: Input::Bytes(bytes), expected }
}

/// Pictures that are cut, too large, or none.
pub fn files() -> Vec<Case> {
    use Refusal::{NotAPicture, TooLarge, TooManyPixels, TooMuchMemory};
    let mut cases = Vec::new();
    let good = pictures::good();
    for (format, file) in &good {
        for part in 0..16 {
            let length = file.len() * part / 16;
            cases.push(bytes(format!("{format} cut to {length}"), file[..length].to_vec(), NotAPicture));
        }
        let mut wrong = file.clone();
        wrong[1] ^= 0x20;
        cases.push(bytes(format!("{format} with wrong magic"), wrong, NotAPicture));
        cases.push(bytes(format!("{format} after a space"), [b" ", &file[..]].concat(), NotAPicture));
        cases.push(bytes(format!("{format} in gzip"), pictures::gzip(file), NotAPicture));
        cases.push(bytes(format!("{format} in base64"), STANDARD.encode(file).into_bytes(), NotAPicture));
        let mut swapped = file.clone();
        swapped.reverse();
        cases.push(bytes(format!("{format} backwards"), swapped, NotAPicture));
    }
    let png = &good[0].1;
    for (name, width, height, expected) in [
        ("the largest png", 0x7fff_ffff, 0x7fff_ffff, TooManyPixels),
        ("png of 65535 a side", 65_535, 65_535, TooManyPixels),
        ("png over the largest size", u32::MAX, u32::MAX, TooManyPixels),
        ("png one pixel over the limit", 1025, 1024, TooManyPixels),
        ("png without width", 0, 100, NotAPicture),
        ("png without height", 100, 0, NotAPicture),
        ("png as a long strip", 1 << 20, 1, NotAPicture),
        ("png of a large claim without data", 1024, 1024, NotAPicture),
    ] {
        cases.push(bytes(name, pictures::png(width, height, 0, &[]), expected));
    }
    // Longer rows than pixels; a palette colour that is not there; no palette.
    cases.push(bytes("png that ends within a row", pictures::png(8, 8, 2, &[pictures::dot()]), NotAPicture));
    cases.push(bytes("png without a palette", pictures::png(1, 1, 3, &[pictures::dot()]), NotAPicture));
    cases.push(bytes("png of an unknown colour", pictures::png(1, 1, 5, &[pictures::dot()]), NotAPicture));
    // The png crate panics on these.
    for length in [4, 5, 767] {
        let chunks = [pictures::chunk(b"PLTE", &vec![7; length]), pictures::dot()];
        let name = format!("png with a palette of {length} bytes");
        cases.push(bytes(name, pictures::png(1, 1, 3, &chunks), NotAPicture));
    }
    let mut broken = png.clone();
    let at = broken.windows(4).position(|four| four == b"IDAT").unwrap();
    broken[at + 40] ^= 0xff;
    cases.push(bytes("png with a wrong checksum", broken, NotAPicture));
    let idat = pictures::chunk(b"IDAT", &[0x78, 0x01, 0x07, 0, 0]);
    cases.push(bytes("png with a wrong deflate block", pictures::png(1, 1, 0, &[idat]), NotAPicture));
    let texts = vec![pictures::chunk(b"tEXt", &[b"k\0".to_vec(), vec![b'x'; 1 << 20]].concat())];
    cases.push(bytes("png with a text over the limit", pictures::png(1, 1, 0, &texts), TooLarge));

    // A million bytes of the smallest parts, for each of which decoders keep more than they are.
    let texts = vec![pictures::chunk(b"tEXt", b"k\0"); 70_000];
    let segments = [0xff, 0xe2, 0, 2].repeat(200_000);
    for (name, file, expected) in [
        ("png of many texts", pictures::png(1, 1, 0, &texts), TooMuchMemory),
        ("jpeg of many segments", [&good[1].1[..2], &segments, &good[1].1[2..]].concat(), TooMuchMemory),
        ("webp of many chunks", pictures::webp_of_chunks(100_000), TooMuchMemory),
        ("gif of 65535 a side", pictures::gif((65_535, 65_535), (1, 1), 1), TooManyPixels),
        ("gif with a frame of 65535 a side", pictures::gif((1, 1), (65_535, 65_535), 1), TooMuchMemory),
        ("gif without pixels", pictures::gif((0, 0), (0, 0), 1), NotAPicture),
        ("gif without frames", pictures::gif((4, 4), (4, 4), 0), NotAPicture),
        ("gif with a frame of nothing", pictures::gif((4, 4), (0, 4), 1), NotAPicture),
        ("gif of a large claim without data", pictures::gif((1024, 1024), (1024, 1024), 1), NotAPicture),
        ("webp of 2^24 a side", pictures::webp_extended(1 << 24, 1 << 24), TooManyPixels),
        ("webp without a frame", pictures::webp_extended(16, 16), NotAPicture),
        ("lossless webp of 16384 a side", pictures::webp_lossless(1 << 14, 1 << 14), TooManyPixels),
        ("lossless webp of zeros", pictures::webp_lossless(64, 64), NotAPicture),
        ("lossy webp of 16383 a side", pictures::webp_lossy(16_383, 16_383), TooManyPixels),
        ("lossy webp without pixels", pictures::webp_lossy(0, 16), NotAPicture),
        ("webp with a large frame on a small screen", pictures::webp_large_frame(), TooMuchMemory),
        ("jpeg of 65535 a side", pictures::jpeg(0xc0, 65_535, 65_535, 3, 1), TooManyPixels),
        ("progressive jpeg of 65535 a side", pictures::jpeg(0xc2, 65_535, 65_535, 3, 1), TooManyPixels),
        ("progressive jpeg at the limit", pictures::jpeg(0xc2, 1024, 1024, 4, 1), TooMuchMemory),
        ("progressive jpeg of 200 components", pictures::jpeg(0xc2, 256, 256, 200, 1), TooMuchMemory),
        ("jpeg without pixels", pictures::jpeg(0xc0, 0, 0, 3, 1), NotAPicture),
        ("jpeg without height", pictures::jpeg(0xc0, 16, 0, 1, 1), NotAPicture),
        ("jpeg without components", pictures::jpeg(0xc0, 16, 16, 0, 1), NotAPicture),
        ("jpeg without scans", pictures::jpeg(0xc0, 16, 16, 1, 0), NotAPicture),
        ("lossless jpeg", pictures::jpeg(0xc3, 16, 16, 1, 1), NotAPicture),
        ("arithmetic jpeg", pictures::jpeg(0xc9, 16, 16, 1, 1), NotAPicture),
        ("jpeg of 200 scans", pictures::jpeg(0xc0, 16, 16, 3, 200), NotAPicture),
        ("progressive jpeg of 200 scans", pictures::jpeg(0xc2, 16, 16, 1, 200), NotAPicture),
        ("bmp of 2^31 a side", pictures::bmp(i32::MAX, i32::MAX, 24, 0, &[]), TooManyPixels),
        ("bmp of -2^31 rows", pictures::bmp(1, i32::MIN, 24, 0, &[]), TooManyPixels),
        ("bmp of negative width", pictures::bmp(-4, 4, 24, 0, &[0; 64]), TooManyPixels),
        ("bmp without data", pictures::bmp(64, 64, 24, 0, &[]), NotAPicture),
        ("bmp of 3 bits a pixel", pictures::bmp(4, 4, 3, 0, &[0; 64]), NotAPicture),
        ("bmp with a jpeg inside", pictures::bmp(4, 4, 0, 4, &good[1].1), NotAPicture),
        ("bmp with a png inside", pictures::bmp(4, 4, 0, 5, png), NotAPicture),
        ("bmp of unknown compression", pictures::bmp(4, 4, 24, 77, &[0; 64]), NotAPicture),
    ] {
        cases.push(bytes(name, file, expected));
    }

    let svg = "<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>";
    let mut mp4 = b"\0\0\0\x18ftypisom\0\0\0\0isomiso2".to_vec();
    mp4.extend([0; 64]);
    for (name, file) in [
        ("nothing", Vec::new()),
        ("one byte", vec![0x89]),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        ("svg", svg.as_bytes().to_vec()),
        (
            "svg with an entity bomb",
            format!("<?xml version='1.0'?><!DOCTYPE s [<!ENTITY a 'aa'><!ENTITY b '&a;&a;'>]>{svg}")
                .into_bytes(),
        ),
        ("gzipped svg", pictures::gzip(svg.as_bytes())),
        ("html", b"<!DOCTYPE html><img src=x onerror=alert(1)>".to_vec()),
        ("pdf", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF".to_vec()),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run".to_vec()),
        (
            "mvg",
            b"push graphic-context\nimage over 0,0 0,0 'https://127.0.0.1/x'\npop graphic-context".to_vec(),
        ),
        (
            "ico",
            [&[0, 0, 1, 0, 1, 0, 16, 16, 0, 0, 1, 0, 24, 0, 40, 0, 0, 0, 22, 0, 0, 0][..], &[0; 64]].concat(),
        ),
        (
            "ico with a png",
            [&[0, 0, 1, 0, 1, 0, 48, 40, 0, 0, 1, 0, 24, 0, 0, 9, 0, 0, 22, 0, 0, 0][..], png].concat(),
        ),
        ("tiff, little-endian", [&b"II*\0\x08\0\0\0"[..], &[0; 64]].concat()),
        ("tiff, big-endian", [&b"MM\0*\0\0\0\x08"[..], &[0; 64]].concat()),
        ("psd", [&b"8BPS\0\x01"[..], &[0; 64]].concat()),
        ("avif", [&b"\0\0\0\x1cftypavif\0\0\0\0avifmif1"[..], &[0; 64]].concat()),
        ("heic", [&b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..], &[0; 64]].concat()),
        ("mp4", mp4),
        ("jpeg xl", [&b"\xff\x0a"[..], &[0; 64]].concat()),
        ("jpeg xl in boxes", [&b"\0\0\0\x0cJXL \r\n\x87\n"[..], &[0; 64]].concat()),
        ("jpeg 2000", [&b"\0\0\0\x0cjP  \r\n\x87\n"[..], &[0; 64]].concat()),
        ("qoi", [&b"qoif\0\0\0\x04\0\0\0\x04\x03\0"[..], &[0; 64]].concat()),
        ("ppm", b"P6 4 4 255\n000000000000000000000000000000000000000000000000".to_vec()),
        ("xpm", b"/* XPM */ static char *x[] = {\"1 1 1 1\", \"a c #000\", \"a\"};".to_vec()),
        ("hdr", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 4 +X 4\n".to_vec()),
        ("exr", [&b"v/1\x01\x02\0\0\0"[..], &[0; 64]].concat()),
        ("dds", [&b"DDS \x7c\0\0\0"[..], &[0; 128]].concat()),
        ("tga", [&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 4, 0, 24, 0][..], &[0; 48]].concat()),
        ("farbfeld", [&b"farbfeld\0\0\0\x01\0\0\0\x01"[..], &[0; 8]].concat()),
        ("zip", b"PK\x03\x04\x14\0\0\0\0\0".to_vec()),
        ("elf", [&b"\x7fELF\x02\x01\x01"[..], &[0; 64]].concat()),
        ("safetensors", b"\x02\0\0\0\0\0\0\0{}".to_vec()),
        ("json", b"{\"url\": \"file:///etc/passwd\"}".to_vec()),
        ("webp without its name", [&b"RIFF\x24\0\0\0WAVEfmt "[..], &[0; 32]].concat()),
        ("gif of another version", [&b"GIF88a\x01\0\x01\0"[..], &[0; 64]].concat()),
        ("png sent as text", [&b"\x89PNG\n\x1a\n"[..], &png[8..]].concat()),
        ("html before a png", [&b"<html>"[..], png].concat()),
        ("zip before a png", [&b"PK\x03\x04"[..], png].concat()),
        ("gif that is also a script", b"GIF89a/*\0\0\0\0\0\0*/=1;alert(1)//".to_vec()),
        (
            "bmp that is also a script",
            b"BM/**/=1;alert(1)//AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".to_vec(),
        ),
        (
            "jpeg that is also a shell script",
            b"\xff\xd8\xff\xfe\0\x20\n#!/bin/sh\ncat /etc/passwd #####\xff\xd9".to_vec(),
        ),
        ("a png's signature twice", [&png[..8], png].concat()),
        ("a png's chunk of 2^32 bytes", [&png[..33], &[0xff; 4][..], b"IDAT", &[0; 64]].concat()),
        (
            "a webp's chunk of 2^32 bytes",
            [&b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff"[..], &[0; 64]].concat(),
        ),
        ("a jpeg's segment of no bytes", [&b"\xff\xd8\xff\xe0\0\0"[..], &[0xff, 0xd9]].concat()),
    ] {
        // Where their size should be, they have text or another part of themselves.
        let large = name.starts_with("bmp that") || name.ends_with("twice");
        let expected = if large { TooManyPixels } else { NotAPicture };
        cases.push(bytes(name, file, expected));
    }
    cases
}

/// The same pictures again as URLs, and URLs that are none.
pub fn data_urls() -> Vec<Case> {
    use Refusal::{BadBase64, BadUrl, NotAPicture, TooLarge, TooManyPixels};
    let png = &pictures::good()[0].1;
    let text = STANDARD.encode(png);
    let mut lines = text.clone();
    lines.insert(76, '\n');
    let mut padded = text.clone();
    padded.insert_str(8, "====");
    // One whole step of the decoder ends in padding.
    let two = format!("{}AA=={}", "A".repeat((64 << 10) - 4), "A".repeat(8));
    let over = "A".repeat(((1 << 20) + 3) / 3 * 4);
    vec![
        url("data url of nothing", "data:", BadUrl),
        url("data url of a comma", "data:,", BadUrl),
        url("data url of text", "data:,hello", BadUrl),
        url("data url in percent code", "data:image/png,%89PNG%0D%0A", BadUrl),
        url("data url without a comma", format!("data:image/png;base64{text}"), BadUrl),
        url("data url whose base64 is no parameter", format!("data:base64,{text}"), BadUrl),
        url("data url of base64 in the middle", format!("data:image/png;base64;x=y,{text}"), BadUrl),
        url("data url of base64url by name", format!("data:image/png;base64url,{text}"), BadUrl),
        url("data url of base32", format!("data:image/png;base32,{text}"), BadUrl),
        url("data url with a long media type", format!("data:{};base64,{text}", "a".repeat(2000)), BadUrl),
        url(
            "data url with a new line in its media type",
            format!("data:image/png\r\nx: y;base64,{text}"),
            BadUrl,
        ),
        url("data url with a zero in its media type", format!("data:image/png\0;base64,{text}"), BadUrl),
        url("data url in another script", format!("data:imáge/png;base64,{text}"), BadUrl),
        url("data url of an empty payload", "data:image/png;base64,", NotAPicture),
        url(
            "data url without padding",
            format!("data:;base64,{}", STANDARD_NO_PAD.encode([0xff; 4])),
            BadBase64,
        ),
        url("data url of base64url", format!("data:;base64,{}", URL_SAFE.encode([0xff; 6])), BadBase64),
        url("data url with new lines", format!("data:;base64,{lines}"), BadBase64),
        url("data url with a space first", format!("data:;base64, {text}"), BadBase64),
        url("data url with percent code", format!("data:;base64,{}", text.replace('+', "%2B")), BadBase64),
        url("data url with padding inside", format!("data:;base64,{padded}"), BadBase64),
        url("data url with padding in a step's end", format!("data:;base64,{two}"), BadBase64),
        url("data url of too much padding", format!("data:;base64,{text}===="), BadBase64),
        url("data url of one character", "data:;base64,A", BadBase64),
        url("data url of padding", "data:;base64,====", BadBase64),
        url("data url with stray bits", "data:;base64,AB==", BadBase64),
        url("data url with a zero", "data:;base64,AAA\0", BadBase64),
        url("data url with a fragment", format!("data:;base64,{text}#x"), BadBase64),
        url("data url with a query", format!("data:;base64,{text}?x"), BadBase64),
        url("data url with another url", "data:;base64,file:///etc/passwd", BadBase64),
        url("data url in full-width letters", "data:;base64,ＡＡＡＡ", BadBase64),
        url("data url in emoji", "data:;base64,🦀🦀🦀🦀", BadBase64),
        url("data url over the limit", format!("data:;base64,{over}"), TooLarge),
        url(
            "data url over the limit that is no base64",
            format!("data:;base64,{}", "!".repeat(over.len())),
            TooLarge,
        ),
        url("giant data url", format!("data:image/png;base64,{}", "A".repeat(64 << 20)), TooLarge),
        url(
            "data url of svg",
            format!("data:image/svg+xml;base64,{}", STANDARD.encode("<svg/>")),
            NotAPicture,
        ),
        url(
            "data url of html as png",
            format!("data:image/png;base64,{}", STANDARD.encode("<html>")),
            NotAPicture,
        ),
        url("data url of a data url", data_url(data_url(png).as_bytes()), NotAPicture),
        url("data url of a bomb", data_url(&pictures::png(60_000, 60_000, 2, &[])), TooManyPixels),
    ]
}

/// What is no URL of a scheme that is taken.
pub fn schemes() -> Vec<Case> {
    let mut cases = Vec::new();
    let plain = "
        : / // . a.png ./a.png ../../etc/passwd /etc/passwd ~/.ssh/id_rsa /proc/self/environ /dev/stdin
        /dev/zero //pics.example.org/a.png C:/Windows/win.ini file:///etc/passwd FILE:///etc/passwd
        file:/etc/passwd file:etc/passwd file://localhost/etc/passwd file://pics.example.org/etc/passwd
        http://pics.example.org/good.png HTTP://pics.example.org/ http://127.0.0.1/
        http:pics.example.org httpss://pics.example.org/ https+unix://x/ ftp://pics.example.org/a.png
        ftps://pics.example.org/a sftp://pics.example.org/a tftp://pics.example.org/a
        gopher://127.0.0.1:6379/_FLUSHALL dict://127.0.0.1:11211/stats ldap://127.0.0.1/
        blob:https://pics.example.org/1 filesystem:https://pics.example.org/a javascript:alert(1)
        vbscript:x about:blank view-source:https://pics.example.org/ jar:https://pics.example.org/a!/b
        netdoc:///etc/passwd php://filter/resource=/etc/passwd expect://id phar://a
        ws://pics.example.org/ wss://pics.example.org/ s3://bucket/a.png gs://bucket/a.png
        hf://model/a.png cid:1@example.org mailto:a@example.org urn:uuid:1 chrome://settings
        smb://pics.example.org/a nfs://pics.example.org/a url:https://pics.example.org/
        feed:https://pics.example.org/ ｈｔｔｐｓ://pics.example.org/ ｆｉｌｅ:///etc/passwd https
        https//pics.example.org data iVBORw0KGgoAAAANSUhEUg==";
    let odd = [
        "",
        "\\\\pics.example.org\\share\\a.png",
        "C:\\Windows\\win.ini",
        " https://pics.example.org/good.png",
        "\thttps://pics.example.org/good.png",
        "\u{feff}https://pics.example.org/",
        "\0https://pics.example.org/",
        " data:image/png;base64,AAAA",
        "h\nttps://pics.example.org/",
    ];
    for text in plain.split_whitespace().chain(odd) {
        cases.push(url(format!("scheme of {text:?}"), text, Refusal::Scheme));
    }
    cases.push(url("a path of many megabytes", "/".repeat(8 << 20), Refusal::Scheme));
    cases.push(url("a scheme of many megabytes", "a".repeat(8 << 20), Refusal::Scheme));
    cases
}

/// URLs that are refused before any name is looked up, where any public host is allowed.
pub fn urls() -> Vec<Case> {
    let mut cases = Vec::new();
    let plain = "
        https: https:/ https:// https:/// https:///pics.example.org/ https:////pics.example.org/
        https:pics.example.org/ https:/pics.example.org/ https://user@pics.example.org/
        https://user:pass@pics.example.org/ https://@pics.example.org/ https://:@pics.example.org/
        https://pics.example.org@127.0.0.1/ https://pics.example.org:443@127.0.0.1/
        https://pics.example.org%40127.0.0.1/ https://pics.example.org%00.evil.test/
        https://pics.example.org%0d%0a/ https://pics.example.org%2f/ https://pics.example.org:99999/
        https://pics.example.org:-1/ https://pics.example.org:4x3/ https://[::1/ https://::1/
        https://[::1%25lo]/ https://[fe80::1%eth0]/ https://[v1.x]/ https://[pics.example.org]/
        https://1.2.3.4.5/ https://256.256.256.256/ https://4294967296/ https://0x100000000/
        https://09.0.0.1/ https://a..b.example.org/ https://.pics.example.org/
        https://pics.example.org../ https://%/ https://<script>/ https://a^b/ https://a|b/
        https://xn--/ https://xn--a-.example/";
    let odd = [
        "https:\\\\pics.example.org\\",
        "https:/\\pics.example.org/",
        "https://pics.example.org\\@127.0.0.1/",
        "https://pics.example.org\\.evil.test/",
        "https://pics.example.org/\r\nhost: 127.0.0.1",
        "https://pics.example.org/a b",
        "https://pics.example.org/\0",
        "https://pics.example.org/\u{7f}",
        "https://pics.example.org/\u{85}",
        "https://pics.example.org/\u{2028}",
        "https://pics.exa\tmple.org/",
        "https://pics.example.org /",
        "https://127.0.0.0x/x y",
        "https://-/ x",
    ];
    for text in plain.split_whitespace().chain(odd) {
        cases.push(url(format!("form of {text:?}"), text, Refusal::BadUrl));
    }
    let long = "a".repeat(64);
    cases.push(url("a long label", format!("https://{long}.example.org/"), Refusal::BadUrl));
    cases.push(url("a long name", format!("https://{}example.org/", "abcdefg.".repeat(40)), Refusal::BadUrl));
    cases.push(url(
        "a long url",
        format!("https://pics.example.org/{}", "a".repeat(1 << 20)),
        Refusal::BadUrl,
    ));
    for port in [1, 22, 25, 80, 444, 6379, 8080, 8443, 65_535] {
        cases.push(url(
            format!("port {port}"),
            format!("https://pics.example.org:{port}/"),
            Refusal::PortNotAllowed,
        ));
    }
    cases
}

/// Every way to write an address that is not public.
pub const INSIDE: &str = "
    127.0.0.1 127.1 127.0.1 127.255.255.254 2130706433 017700000001 0x7f000001 0X7F000001 0x7f.1
    0177.0.0.1 0177.0.0.01 00000177.0.0.1 0x7f.0x0.0x0.0x1 0x7f.0.0.1 127.0x1 127.00000000001 127.0.0.1.
    0 0.0.0.0 0x0 00 0. 1 10.0.0.1 10.1 0xa.1 012.1 167772161 100.64.0.1 100.100.100.200
    0x64.0x64.0x64.0xc8 169.254.169.254 169.254.43518 2852039166 0xa9fea9fe 0xa9.0xfe.0xa9.0xfe
    0251.0376.0251.0376 025177524776 169.254.170.2 168.63.129.16 172.16.0.1 172.31.255.255 192.168.0.1
    192.168.1 3232235521 192.0.0.192 192.0.2.1 192.88.99.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1
    239.1.2.3 240.0.0.1 255.255.255.255 4294967295 0xffffffff %31%32%37.0.0.1 %30 １２７.０.０.１ ①②⑦.⓪.⓪.①
    127。0。0。1 127．0．0．1 127｡0｡0｡1 0ₓ7f.1 [::] [::1] [0:0:0:0:0:0:0:1]
    [0000:0000:0000:0000:0000:0000:0000:0001] [::0.0.0.1] [::127.0.0.1] [::ffff:127.0.0.1]
    [::ffff:7f00:1] [0:0:0:0:0:ffff:7f00:1] [::FFFF:127.0.0.1] [::ffff:0:127.0.0.1] [::ffff:10.0.0.1]
    [::ffff:169.254.169.254] [::ffff:a9fe:a9fe] [::ffff:0.0.0.0] [64:ff9b::127.0.0.1]
    [64:ff9b::a9fe:a9fe] [64:ff9b::10.0.0.1] [64:ff9b:1::7f00:1] [2002:7f00:1::] [2002:a9fe:a9fe::1]
    [2002:a00:1::1] [2001:0:7f00:1::] [2001::1] [2001:0:4136:e378:8000:63bf:80ff:fffe] [2001:db8::1]
    [2001:2::1] [2001:10::1] [3fff::1] [5f00::1] [fe80::1] [fe80::5efe:7f00:1] [2606:4700::5efe:7f00:1]
    [2606:4700::200:5efe:a00:1] [fec0::1] [fc00::1] [fd00::1] [fd00:ec2::254] [fd20:ce::254] [ff02::1]
    [ff0e::1] [100::1]";
