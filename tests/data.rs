//! Labelled sets: every format, written here, and the shared photos where they are.

mod fixture;

use std::collections::BTreeSet;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::Device;
use fixture::path;
use image::{ImageFormat, Rgb, RgbImage};
use radapt::data::{Item, LabelledSet, OpenOptions, registry};
use radapt::image::DecodeLimits;
use radapt::model::{Lookup, Model};
use radapt::pocket::{KINDS, Split, draw};
use radapt::text::ZeroShotHead;
use radapt::{Error, Result};
use sha2::{Digest, Sha256};

// --- Writing -------------------------------------------------------------------------------------

/// A picture of one colour.
fn png(shade: u8) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    RgbImage::from_pixel(4, 3, Rgb([shade, 10, 20])).write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn put(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let file = folder.join(name);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, bytes).unwrap();
}

fn tar(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

/// The members of a sample of a WebDataset.
fn sample(key: &str, shade: u8, label: &str) -> [(String, Vec<u8>); 2] {
    [(format!("{key}.png"), png(shade)), (format!("{key}.cls"), label.into())]
}

fn shard(samples: &[(&str, u8, &str)]) -> Vec<u8> {
    let members: Vec<_> = samples.iter().flat_map(|(key, shade, label)| sample(key, *shade, label)).collect();
    tar(&members.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect::<Vec<_>>())
}

// --- Reading -------------------------------------------------------------------------------------

fn open(path: &Path) -> LabelledSet {
    LabelledSet::open(path, &OpenOptions::default()).unwrap()
}

fn with_classes(path: &Path, classes: PathBuf) -> Result<LabelledSet> {
    LabelledSet::open(path, &OpenOptions { classes: Some(classes), dataset: None })
}

fn picture(set: &LabelledSet, index: usize) -> RgbImage {
    set.picture(index, &DecodeLimits::default()).unwrap()
}

/// The red of a picture's first pixel.
fn shade(set: &LabelledSet, index: usize) -> u8 {
    picture(set, index).get_pixel(0, 0).0[0]
}

fn ids(set: &LabelledSet) -> Vec<&str> {
    set.items().iter().map(|item| item.id.as_str()).collect()
}

fn labels(set: &LabelledSet) -> Vec<usize> {
    set.items().iter().map(|item| item.label).collect()
}

fn defects(set: &LabelledSet) -> Vec<(&str, &str)> {
    set.defects().iter().map(|defect| (defect.id.as_str(), defect.reason.as_str())).collect()
}

/// That a set is refused, in one line with all the parts.
#[track_caller]
fn assert_refused(found: Result<LabelledSet>, parts: &[&str]) {
    let error = found.expect_err("it is to be refused").to_string();
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[track_caller]
fn refused(path: &Path, parts: &[&str]) {
    assert_refused(LabelledSet::open(path, &OpenOptions::default()), parts);
}

// --- Image folders -------------------------------------------------------------------------------

const PICTURES: [(&str, u8); 5] = [
    ("fire_truck/b.png", 1),
    ("Zebra/a.png", 2),
    ("fire_truck/a.PNG", 3),
    ("cat/10.png", 4),
    ("cat/in/9.png", 5),
];

fn image_folder(order: impl Iterator<Item = usize>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for i in order {
        put(folder.path(), PICTURES[i].0, png(PICTURES[i].1));
    }
    folder
}

#[test]
fn an_image_folder_is_read_in_bytewise_order_however_it_was_written() {
    let folder = image_folder(0..5);
    let set = open(folder.path());
    assert_eq!(set.classes(), ["Zebra", "cat", "fire truck"]);
    assert_eq!(
        ids(&set),
        ["Zebra/a.png", "cat/10.png", "cat/in/9.png", "fire_truck/a.PNG", "fire_truck/b.png"]
    );
    assert_eq!(labels(&set), [0, 1, 1, 2, 2]);
    assert_eq!((0..5).map(|i| shade(&set, i)).collect::<Vec<_>>(), [2, 4, 5, 3, 1]);
    assert_eq!(picture(&set, 0).dimensions(), (4, 3));
    assert!(set.templates().is_none() && set.entry().is_none() && set.defects().is_empty());

    let again = image_folder([3, 1, 4, 0, 2].into_iter());
    let again = open(again.path());
    assert_eq!(again.items(), set.items());
    assert_eq!(again.digest(), set.digest());
}

#[test]
fn what_is_no_picture_is_left_out_and_what_cannot_be_read_is_a_defect() {
    let folder = image_folder(0..5);
    let path = folder.path();
    for other in ["README.md", "cat/notes.txt", "cat/.hidden.png", ".git/x/y.png", "stray.png"] {
        put(path, other, "no picture");
    }
    put(path, "cat/scan.tif", "II*");
    put(path, "cat/11.png", "no picture");
    let set = open(path);
    assert_eq!(set.classes().len(), 3);
    assert_eq!(defects(&set), [("cat/scan.tif", "is no PNG, JPEG, WebP, BMP or GIF file")]);
    assert_eq!(set.items().len(), 6);
    // A damaged file is found when it is read, and concerns itself alone.
    let bad = ids(&set).iter().position(|id| *id == "cat/11.png").unwrap();
    for i in 0..6 {
        let found = set.picture(i, &DecodeLimits::default());
        assert_eq!(found.is_err(), i == bad);
        if let Err(error) = found {
            assert!(matches!(&error, Error::Picture { name, .. } if name.ends_with("cat/11.png")), "{error}");
        }
    }
    assert!(set.picture(6, &DecodeLimits::default()).is_err());
}

#[test]
fn a_file_of_names_names_folders_by_name_or_else_by_place() {
    let folder = image_folder(0..5);
    let names = |text: &str| {
        let file = folder.path().join("names.txt");
        fs::write(&file, text).unwrap();
        file
    };
    // Every folder is named, in another order and among others.
    let set = with_classes(folder.path(), names("dog\nfire truck\nZebra\ncat\n")).unwrap();
    assert_eq!(set.classes(), ["dog", "fire truck", "Zebra", "cat"]);
    assert_eq!(labels(&set), [2, 3, 3, 1, 1]);
    // As many names as folders: like ImageNet's, whose folders have numbers.
    let set = with_classes(folder.path(), names("one\ntwo\r\nthree\n\n")).unwrap();
    assert_eq!(
        (set.classes(), labels(&set)),
        (&["one", "two", "three"].map(String::from)[..], vec![0, 1, 1, 2, 2])
    );
    let few = with_classes(folder.path(), names("one\ncat\n"));
    assert_refused(few, &["names.txt", "2 names for 3 folders"]);
    assert_refused(with_classes(folder.path(), names("one\n\nthree\n")), &["names.txt", "line 2 is empty"]);
    assert_refused(with_classes(folder.path(), names("\n")), &["names.txt", "found none"]);
    assert_refused(with_classes(folder.path(), "nowhere.txt".into()), &["cannot read `nowhere.txt`"]);
}

#[test]
fn nothing_to_read_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    refused(path, &["holds no data set"]);
    refused(&path.join("missing"), &["cannot read", "missing"]);
    put(path, "cat/notes.txt", "");
    refused(path, &["holds no data set"]);
    put(path, "dog/a.tiff", "");
    refused(path, &["no item of 1 can be used", "`dog/a.tiff` is no PNG"]);
    put(path, "file.zip", "PK");
    refused(&path.join("file.zip"), &["file.zip", "expected a folder, a `.tar`"]);
    put(path, "empty", "");
    refused(&path.join("empty"), &["empty", "expected a folder"]);
}

// --- Tars ----------------------------------------------------------------------------------------

const NAMES: &str = "crane\nmaillot\ncrane\ncrane (2)\n";

#[test]
fn a_webdataset_is_read_with_its_names_and_templates() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("wds_toy");
    put(&root, "test/0.tar", shard(&[("s0000000", 1, "0"), ("s0000001", 2, "3\n")]));
    put(&root, "test/1.tar", shard(&[("s0000000", 3, "2"), ("in/s.1.2", 4, " 1 ")]));
    put(&root, "test/nshards.txt", "2\n");
    put(&root, "classnames.txt", NAMES);
    put(&root, "zeroshot_classification_templates.txt", "a photo of a {c}.\nthe {class}\n");
    for at in [root.clone(), root.join("test")] {
        let set = open(&at);
        assert_eq!(set.name(), "wds_toy");
        assert_eq!(ids(&set), ["0.tar/s0000000", "0.tar/s0000001", "1.tar/in/s", "1.tar/s0000000"]);
        assert_eq!(labels(&set), [0, 3, 1, 2]);
        assert_eq!((0..4).map(|i| shade(&set, i)).collect::<Vec<_>>(), [1, 2, 4, 3]);
        assert_eq!(set.classes(), ["crane", "maillot", "crane (3)", "crane (2)"]);
        assert_eq!(set.prompt_names(), ["crane", "maillot", "crane", "crane (2)"]);
        assert_eq!(set.templates().unwrap(), ["a photo of a {class}.", "the {class}"]);
    }
    let one = open(&root.join("test/1.tar"));
    assert_eq!((one.name(), ids(&one)), ("wds_toy", vec!["1.tar/in/s", "1.tar/s0000000"]));

    fs::write(root.join("test/nshards.txt"), "3").unwrap();
    refused(&root, &["has 2 tars, but `nshards.txt` says 3"]);
    fs::write(root.join("test/nshards.txt"), "many").unwrap();
    refused(&root, &["nshards.txt", "found `many`"]);
    fs::remove_file(root.join("test/nshards.txt")).unwrap();
    fs::write(root.join("zeroshot_classification_templates.txt"), "a photo").unwrap();
    refused(&root, &["zeroshot_classification_templates.txt", "`a photo` has no place"]);
    fs::remove_file(root.join("classnames.txt")).unwrap();
    refused(&root, &["has no `classnames.txt`", "--classes"]);
}

#[test]
fn samples_that_cannot_be_used_are_counted_with_their_reason() {
    let folder = tempfile::tempdir().unwrap();
    let members = [
        ("a.png", png(1)),
        ("a.cls", b"0".to_vec()),
        ("b.png", png(2)),
        ("c.cls", b"1".to_vec()),
        ("d.png", png(3)),
        ("d.cls", b"4".to_vec()),
        ("e.png", png(4)),
        ("e.cls", b"crane".to_vec()),
        ("a.jpg", png(5)),
        ("a.cls", b"1".to_vec()),
        ("f.tiff", png(6)),
        ("f.cls", b"1".to_vec()),
        ("g.json", b"{}".to_vec()),
        ("h.png", b"cut".to_vec()),
        ("h.cls", b"-1".to_vec()),
        ("i.webp", b"cut".to_vec()),
        ("i.cls", b"1".to_vec()),
    ];
    put(folder.path(), "0.tar", tar(&members));
    put(folder.path(), "classnames.txt", NAMES);
    let set = open(folder.path());
    assert_eq!(ids(&set), ["0.tar/a", "0.tar/i"]);
    assert_eq!(labels(&set), [0, 1]);
    assert_eq!(shade(&set, 0), 1);
    assert!(set.picture(1, &DecodeLimits::default()).unwrap_err().to_string().contains("`0.tar/i`"));
    let expected = [
        ("0.tar/a", "has two pictures"),
        ("0.tar/a", "has two labels"),
        ("0.tar/b", "has no `.cls`"),
        ("0.tar/c", "has no picture"),
        ("0.tar/d", "has label 4, but there are 4 classes"),
        ("0.tar/e", "has the label `crane`, expected a number"),
        ("0.tar/f", "has no picture"),
        ("0.tar/f.tiff", "is no PNG, JPEG, WebP, BMP or GIF file"),
        ("0.tar/h", "has the label `-1`, expected a number"),
    ];
    assert_eq!(defects(&set), expected);
}

#[test]
fn members_in_another_order_are_the_same_set() {
    let folder = tempfile::tempdir().unwrap();
    let samples = [("a", 1, "0"), ("b", 2, "1"), ("c", 3, "0")];
    let of = |order: [usize; 3]| {
        put(folder.path(), "0.tar", shard(&order.map(|i| samples[i])));
        put(folder.path(), "classnames.txt", "x\ny");
        let set = open(folder.path());
        ((0..3).map(|i| shade(&set, i)).collect::<Vec<_>>(), ids(&set).join(" "), set.digest())
    };
    let expected = of([0, 1, 2]);
    assert_eq!(expected.0, [1, 2, 3]);
    assert_eq!(of([2, 0, 1]), expected);
    put(folder.path(), "classnames.txt", "x\nz");
    assert_ne!(open(folder.path()).digest(), expected.2);
}

#[test]
fn a_tar_of_an_image_folder_is_one() {
    let folder = tempfile::tempdir().unwrap();
    for (above, name) in [("", "plain.tar"), ("./data/train/", "deep.tar")] {
        let names: Vec<String> = PICTURES.iter().map(|(name, _)| format!("{above}{name}")).collect();
        let members: Vec<_> =
            names.iter().zip(PICTURES).map(|(name, (_, shade))| (&**name, png(shade))).collect();
        put(folder.path(), name, tar(&members));
        let set = open(&folder.path().join(name));
        assert_eq!(set.classes(), ["Zebra", "cat", "fire truck"]);
        assert_eq!(labels(&set), [0, 1, 1, 2, 2]);
        assert_eq!((0..5).map(|i| shade(&set, i)).collect::<Vec<_>>(), [2, 4, 5, 3, 1]);
        assert!(set.items().iter().all(|item| item.id.starts_with(name)));
    }
    put(folder.path(), "loose.tar", tar(&[("a.png", png(1)), ("cat/b.png", png(2))]));
    let set = open(&folder.path().join("loose.tar"));
    assert_eq!(defects(&set), [("loose.tar/a.png", "has no `.cls` and no folder")]);
}

#[test]
fn a_cut_tar_is_an_error_wherever_it_was_cut() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), "classnames.txt", "x\ny");
    let whole = shard(&[("a", 1, "0"), ("b", 2, "1")]);
    let file = folder.path().join("0.tar");
    // Four members of a header and a block each, then two blocks of zeros.
    assert_eq!(whole.len(), 10 * 512);
    for length in (0..whole.len()).step_by(64) {
        put(folder.path(), "0.tar", &whole[..length]);
        let found = LabelledSet::open(&file, &OpenOptions::default());
        // One block of zeros is a mark.
        assert_eq!(found.is_ok(), length >= 9 * 512, "{length} bytes");
        if let Err(error) = found {
            assert!(error.to_string().contains("0.tar"), "{error}");
        }
    }
    put(folder.path(), "0.tar", &whole[..whole.len() - 4 * 512 + 100]);
    refused(&file, &["0.tar"]);
    put(folder.path(), "0.tar", &whole[..600]);
    refused(&file, &["ends within `a.png`, after 88 of"]);
    put(folder.path(), "0.tar", &whole[..2048]);
    refused(&file, &["ends without a tar's end mark"]);
    put(folder.path(), "0.tar", [7; 4096]);
    refused(&file, &["is no whole tar"]);
}

#[test]
fn a_member_over_the_limit_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), "0.tar", shard(&[("a", 1, "0")]));
    put(folder.path(), "classnames.txt", "x");
    let limits = DecodeLimits { max_bytes: 20, ..DecodeLimits::default() };
    let error = open(folder.path()).picture(0, &limits).unwrap_err();
    assert!(matches!(error, Error::PictureTooLarge { limit: 20, unit: "bytes", .. }), "{error}");
}

// --- CIFAR and STL10 -----------------------------------------------------------------------------

/// Byte `j` of picture `i`, as in `tests/fixtures/data/make.py`.
fn byte(i: usize, j: usize) -> u8 {
    ((7 * i + j) % 251) as u8
}

fn pixels(i: usize) -> Vec<u8> {
    (0..3072).map(|j| byte(i, j)).collect()
}

#[track_caller]
fn assert_pixels(set: &LabelledSet, count: usize) {
    assert_eq!(set.items().len(), count);
    for i in 0..count {
        let picture = picture(set, i);
        assert_eq!(picture.dimensions(), (32, 32));
        for (x, y, pixel) in picture.enumerate_pixels() {
            let at = (32 * y + x) as usize;
            assert_eq!(pixel.0, [0, 1024, 2048].map(|plane| byte(i, plane + at)));
        }
    }
}

#[test]
fn cifar_binaries_are_read_with_the_registered_names() {
    let folder = tempfile::tempdir().unwrap();
    let rows = |labels: &[&[u8]]| -> Vec<u8> {
        labels.iter().enumerate().flat_map(|(i, labels)| [labels.to_vec(), pixels(i)].concat()).collect()
    };
    put(folder.path(), "test_batch.bin", rows(&[&[6], &[9], &[10]]));
    for path in [folder.path().to_path_buf(), folder.path().join("test_batch.bin")] {
        let set = open(&path);
        assert_eq!((set.name(), set.entry().unwrap().title.as_str()), ("cifar10", "CIFAR-10"));
        assert_eq!((set.classes()[6].as_str(), set.classes().len()), ("frog", 10));
        assert_eq!(ids(&set), ["test_batch.bin/000000", "test_batch.bin/000001"]);
        assert_eq!(labels(&set), [6, 9]);
        assert_eq!(defects(&set), [("test_batch.bin/000002", "has label 10, but there are 10 classes")]);
        assert_eq!(set.templates().unwrap().len(), 18);
        assert_pixels(&set, 2);
    }
    put(folder.path(), "batches.meta.txt", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n");
    assert_eq!(open(folder.path()).classes()[6], "g");

    let hundred = tempfile::tempdir().unwrap();
    put(hundred.path(), "test.bin", rows(&[&[19, 99], &[0, 1]]));
    let set = open(hundred.path());
    assert_eq!((set.name(), labels(&set)), ("cifar100", vec![99, 1]));
    assert_eq!(set.classes()[1], "aquarium fish");
    assert_pixels(&set, 2);

    // Under another name the length tells which of the two it is.
    put(hundred.path(), "mine.bin", rows(&[&[19, 99]]));
    assert_eq!(open(&hundred.path().join("mine.bin")).name(), "cifar100");
    put(hundred.path(), "mine.bin", [0; 3075]);
    refused(&hundred.path().join("mine.bin"), &["has 3075 bytes"]);
    for length in [0, 3073, 3074 * 2 - 1] {
        put(hundred.path(), "test.bin", vec![0; length]);
        refused(
            hundred.path(),
            &["test.bin", &format!("has {length} bytes, expected 3074 for each picture")],
        );
    }
}

/// A pickle as Python 2's `cPickle` wrote CIFAR's.
fn python2(labels: &str, numbers: &[u8], shape: [u8; 4]) -> Vec<u8> {
    let name = |name: &str| [&[b'U', name.len() as u8], name.as_bytes()].concat();
    let data: Vec<u8> = (0..numbers.len()).flat_map(pixels).collect();
    let numbers: Vec<u8> = numbers.iter().flat_map(|label| [b'K', *label]).collect();
    [
        b"\x80\x02}q\x01(".to_vec(),
        name("batch_label"),
        b"q\x02".to_vec(),
        name("testing batch 1 of 1"),
        name(labels),
        b"]q\x05(".to_vec(),
        numbers,
        b"e".to_vec(),
        name("data"),
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01bq\n\x87q\x0bRq\x0c(K\x01"
            .to_vec(),
        [&b"M"[..], &shape[..2], b"M", &shape[2..]].concat(),
        b"\x86q\rcnumpy\ndtype\nq\x0eU\x02u1q\x0fK\x00K\x01\x87q\x10Rq\x11(K\x03U\x01|q\x12NNNJ\xff\xff\xff\xff".to_vec(),
        b"J\xff\xff\xff\xffK\x00tq\x13b\x89T".to_vec(),
        (data.len() as u32).to_le_bytes().to_vec(),
        data,
        b"q\x14tq\x15b".to_vec(),
        name("filenames"),
        b"]q\x16(U\x05a.pngU\x05b.pngeu.".to_vec(),
    ]
    .concat()
}

#[test]
fn cifar_batches_of_python_2_are_read_without_running_them() {
    let folder = tempfile::tempdir().unwrap();
    let ten = folder.path().join("cifar-10-batches-py");
    put(&ten, "test_batch", python2("labels", &[6, 9, 11], [3, 0, 0, 12]));
    for path in [ten.clone(), ten.join("test_batch")] {
        let set = open(&path);
        assert_eq!((set.name(), set.classes()[6].as_str()), ("cifar10", "frog"));
        assert_eq!(ids(&set), ["test_batch/000000", "test_batch/000001"]);
        assert_eq!(labels(&set), [6, 9]);
        assert_eq!(defects(&set), [("test_batch/000002", "has label 11, but there are 10 classes")]);
        assert_pixels(&set, 2);
    }
    // The names as a pickle of protocol 0, as CIFAR-10's are.
    let names: Vec<String> = "abcdefghij".chars().map(|c| format!("S'{c}_{c}'\np4\na")).collect();
    let meta = format!(
        "(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'label_names'\np3\n(lp4\n{}sS'num_vis'\nL3072L\ns.",
        names.concat()
    );
    put(&ten, "batches.meta", meta);
    assert_eq!(open(&ten).classes()[..2], ["a a", "b b"]);
    put(&ten, "batches.meta", "(dp1\n.");
    refused(&ten, &["batches.meta", "has no list `label_names`"]);

    let hundred = folder.path().join("cifar-100-python");
    put(&hundred, "test", python2("fine_labels", &[99, 1], [2, 0, 0, 12]));
    let set = open(&hundred);
    assert_eq!((set.name(), labels(&set)), ("cifar100", vec![99, 1]));
    assert_pixels(&set, 2);
}

#[test]
fn batches_of_todays_numpy_are_read_too() {
    for protocol in 3..=5 {
        let set = open(&path(&format!("data/protocol{protocol}.pkl")));
        assert_eq!((set.name(), labels(&set)), ("cifar10", vec![3, 9]));
        assert_pixels(&set, 2);
    }
    // Python 3 writes bytes of protocol 2 as a call, which is not made.
    refused(&path("data/protocol2.pkl"), &["asks for `_codecs.encode`, which is refused"]);
}

#[test]
fn a_bad_pickle_is_an_error_and_runs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("test_batch");
    let marker = folder.path().join("ran");
    let attack = format!("(dp0\nS'data'\ncos\nsystem\n(S'touch {}'\ntRs.", marker.display());
    put(folder.path(), "test_batch", attack);
    refused(&file, &["test_batch", "asks for `os.system`, which is refused"]);
    assert!(!marker.exists());

    let good = python2("labels", &[6, 9], [2, 0, 0, 12]);
    for length in 0..good.len() {
        if length > 400 && length < good.len() - 60 && length % 97 != 0 {
            continue;
        }
        put(folder.path(), "test_batch", &good[..length]);
        assert!(LabelledSet::open(&file, &OpenOptions::default()).is_err(), "{length} bytes");
    }
    for (shape, part) in [([3, 0, 0, 12], "has 6144 bytes"), ([0, 12, 2, 0], "has shape [3072, 2]")] {
        put(folder.path(), "test_batch", python2("labels", &[6, 9], shape));
        refused(&file, &["test_batch", part]);
    }
    put(folder.path(), "test_batch", python2("coarse_labels", &[6, 9], [2, 0, 0, 12]));
    refused(&file, &["has neither `labels` nor `fine_labels`"]);
    for (text, part) in [
        (&b"\x80\x02]."[..], "expected a dictionary"),
        (b"\x80\x02e.", "a mark is missing"),
        (b"\x80\x09.", "protocol 9"),
        (b"\x80\x02.", "stack is empty"),
        (b"\x80\x02h\x07.", "nothing was remembered as 7"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "ends within"),
        (b"\x80\x02}Q.", "expected a dictionary"),
        (b"\x80\x02\x82\x01.", "instruction 0x82"),
    ] {
        put(folder.path(), "test_batch", text);
        refused(&file, &["test_batch", part]);
    }
}

#[test]
fn stl10_is_read_by_columns_and_counts_from_one() {
    const PICTURE: usize = 3 * 96 * 96;
    let folder = tempfile::tempdir().unwrap();
    let pictures: Vec<u8> = (0..3 * PICTURE).map(|j| byte(j / PICTURE, j % PICTURE)).collect();
    put(folder.path(), "test_X.bin", &pictures);
    put(folder.path(), "test_y.bin", [10, 0, 1]);
    put(folder.path(), "unlabeled_X.bin", &pictures);
    for path in [folder.path().to_path_buf(), folder.path().join("test_X.bin")] {
        let set = open(&path);
        assert_eq!((set.name(), set.classes()[9].as_str()), ("stl10", "truck"));
        assert_eq!(ids(&set), ["test_X.bin/000000", "test_X.bin/000002"]);
        assert_eq!(labels(&set), [9, 0]);
        assert_eq!(defects(&set), [("test_X.bin/000001", "has label 0, but STL10's labels count from 1")]);
        for (x, y, pixel) in picture(&set, 1).enumerate_pixels() {
            let at = (96 * x + y) as usize;
            assert_eq!(pixel.0, [0, 1, 2].map(|plane| byte(2, plane * 96 * 96 + at)));
        }
    }
    put(folder.path(), "class_names.txt", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n");
    assert_eq!(open(folder.path()).classes()[9], "j");
    refused(&folder.path().join("unlabeled_X.bin"), &["unlabeled_X.bin", "which have labels"]);
    put(folder.path(), "test_X.bin", &pictures[..PICTURE]);
    refused(folder.path(), &["test_X.bin", "has 27648 bytes, expected 82944"]);
    fs::remove_file(folder.path().join("test_y.bin")).unwrap();
    refused(folder.path(), &["cannot read", "test_y.bin"]);
}

#[test]
fn a_registered_set_can_be_named() {
    let folder = tempfile::tempdir().unwrap();
    let of = |dataset: &str| {
        let options = OpenOptions { classes: None, dataset: Some(dataset.into()) };
        LabelledSet::open(folder.path(), &options)
    };
    // Without names of its own it takes the registered ones.
    put(folder.path(), "0.tar", shard(&[("a", 1, "0"), ("b", 2, "1")]));
    let set = of("pcam").unwrap();
    assert_eq!((set.name(), set.classes()[0].as_str()), ("pcam", "lymph node"));
    assert_eq!(set.templates().unwrap(), registry::entry("pcam").unwrap().templates.as_ref().unwrap());
    put(folder.path(), "classnames.txt", "x\ny\n");
    assert_eq!(of("pcam").unwrap().classes(), ["x", "y"]);
    assert_refused(of("dtd"), &["has 2 classes, but DTD has 47"]);
    assert_refused(of("nothing"), &["data set: expected imagenet1k, ", "found nothing"]);
    // A folder so called is the set, if it has as many classes.
    let root = folder.path().join("wds_vtab-pcam");
    put(&root, "test/0.tar", shard(&[("a", 1, "0")]));
    assert_eq!(open(&root).entry().unwrap().name, "pcam");
    put(&root, "classnames.txt", "x\ny\nz\n");
    assert!(open(&root).entry().is_none());
}

// --- The pocket world, subsets -------------------------------------------------------------------

fn pocket(n: u64) -> LabelledSet {
    LabelledSet::pocket(Split::Test, 7, n, 96).unwrap()
}

#[test]
fn the_pocket_world_is_a_set() {
    let set = pocket(60);
    assert_eq!(set.name(), "pocket test");
    assert_eq!(set.templates().unwrap(), ["a photo of a {class}."]);
    assert!(set.classes().iter().zip(&KINDS).all(|(class, kind)| class == kind.name));
    for (index, item) in set.items().iter().enumerate() {
        let scene = draw(Split::Test, 7, index as u64, 96).unwrap();
        assert_eq!((item.label, item.id.clone()), (scene.kind, format!("pocket-test-7/{index:012}")));
        assert_eq!(picture(&set, index), scene.picture);
    }
    assert!(LabelledSet::pocket(Split::Test, 7, 0, 96).is_err());
    assert!(LabelledSet::pocket(Split::Test, 7, 1, 95).is_err());
}

#[test]
fn a_sample_is_seeded_keeps_the_order_and_grows_with_n() {
    let numbers = |set: &LabelledSet| -> Vec<usize> {
        ids(set).iter().map(|id| id.rsplit('/').next().unwrap().parse().unwrap()).collect()
    };
    let of = |n, seed| numbers(&pocket(1000).sample(n, seed));
    // The same on every platform.
    assert_eq!(of(8, 0), GOLDEN);
    assert_ne!(of(8, 1), of(8, 0));
    let large = of(300, 0);
    assert_eq!(large.len(), 300);
    assert!(large.is_sorted() && GOLDEN.iter().all(|i| large.contains(i)));
    assert_eq!(of(1000, 3), (0..1000).collect::<Vec<_>>());
    assert_eq!(of(5000, 3).len(), 1000);
    assert_eq!(numbers(&pocket(1000).first(3)), [0, 1, 2]);
    // Every item is as likely as another: 200 draws of 100 from 1000.
    let mut count = [0; 20];
    for seed in 0..200 {
        of(100, seed).iter().for_each(|i| count[i / 50] += 1);
    }
    assert!(count.iter().all(|n| (870..1130).contains(n)), "{count:?}");

    let set = pocket(1000).sample(8, 0);
    let scene = draw(Split::Test, 7, GOLDEN[5] as u64, 96).unwrap();
    assert_eq!((picture(&set, 5), set.items()[5].label), (scene.picture, scene.kind));
    assert_ne!(set.digest(), pocket(1000).digest());
}

/// As an implementation of ChaCha8 in Python draws them too.
const GOLDEN: [usize; 8] = [72, 303, 322, 431, 566, 724, 908, 999];

#[test]
fn shards_are_disjoint_and_together_all() {
    let all = pocket(1000);
    let mut seen = BTreeSet::new();
    for i in 1..=3 {
        let shard = all.clone().shard(i, 3).unwrap();
        assert!((270..400).contains(&shard.items().len()), "{}", shard.items().len());
        for Item { id, .. } in shard.items() {
            assert!(seen.insert(id.clone()), "{id} is in two shards");
            // By the id's hash alone, so that another subset falls into the same shards.
            let hash = Sha256::digest(id.as_bytes());
            assert_eq!(u64::from_le_bytes(hash[..8].try_into().unwrap()) % 3, i - 1);
        }
    }
    assert_eq!(seen.len(), 1000);
    assert_eq!(all.clone().shard(1, 1).unwrap().digest(), all.digest());
    for (i, n) in [(0, 3), (4, 3), (1, 0)] {
        assert!(matches!(all.clone().shard(i, n), Err(Error::Argument { .. })));
    }
}

#[test]
fn threads_read_the_same_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let keys: Vec<String> = (0..200).map(|i| format!("k{i:03}")).collect();
    let samples: Vec<_> = keys.iter().zip(0..).map(|(key, i)| (key.as_str(), i, "0")).collect();
    put(folder.path(), "0.tar", shard(&samples));
    put(folder.path(), "classnames.txt", "x");
    let set = open(folder.path());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..200).for_each(|i| assert_eq!(usize::from(shade(&set, i)), i)));
        }
    });
}

#[test]
fn classes_of_one_name_have_one_row_each() {
    let model = Model::find(path("clip_text/hf").to_str().unwrap(), &Lookup::default()).unwrap();
    let text = model.text(&Device::Cpu).unwrap();
    let head = |classes: &[&str], names: &[&str]| {
        ZeroShotHead::with_prompt_names(&text, classes, names, &["a photo of a {class}."])
    };
    let found = head(&["crane", "dog", "crane (2)"], &["crane", "dog", "crane"]).unwrap();
    assert_eq!(found.classes, ["crane", "dog", "crane (2)"]);
    let rows = found.weights.to_vec2::<f32>().unwrap();
    assert_eq!(rows[0], rows[2]);
    assert_ne!(rows[0], rows[1]);
    let plain = ZeroShotHead::new(&text, &["crane", "dog"], &["a photo of a {class}."]).unwrap();
    assert_eq!(plain.weights.to_vec2::<f32>().unwrap(), rows[..2]);
    for (classes, names) in
        [(&["a", "b"][..], &["a"][..]), (&["a", "a"], &["a", "b"]), (&["a", "b"], &["a", " "]), (&[], &[])]
    {
        assert!(matches!(head(classes, names), Err(Error::Argument { .. })));
    }
}

// --- The shared pictures -------------------------------------------------------------------------

fn shared(name: &str) -> Option<PathBuf> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("shared/data").join(name);
    if !file.exists() {
        eprintln!("SKIPPED: there is no {}", file.display());
        return None;
    }
    Some(file)
}

#[test]
fn a_thousand_photos_of_imagenet_are_a_set() {
    let Some(folder) = shared("photos") else { return };
    let set = open(&folder);
    assert_eq!((set.name(), set.items().len(), set.defects()), ("photos", 1000, &[][..]));
    let found: BTreeSet<usize> = labels(&set).into_iter().collect();
    assert_eq!(found, (0..1000).collect());
    let classes: BTreeSet<_> = set.classes().iter().collect();
    assert_eq!((classes.len(), set.prompt_names().len()), (1000, 1000));
    let again: Vec<_> = set.classes().iter().filter(|class| class.ends_with(" (2)")).collect();
    assert_eq!(again, ["crane (2)", "maillot (2)"]);
    assert_eq!(set.templates().unwrap(), ["a photo of a {class}."]);
    assert_eq!((set.items()[7].id.as_str(), set.items()[7].label), ("0.tar/s0000007", 7));
    for i in (0..1000).step_by(50) {
        let picture = picture(&set, i);
        assert_eq!(picture.width().min(picture.height()), 256);
    }
    let one = open(&folder.join("0.tar"));
    assert_eq!((one.name(), one.digest()), ("photos", set.digest()));

    let model = Model::find(path("clip_text/hf").to_str().unwrap(), &Lookup::default()).unwrap();
    let text = model.text(&Device::Cpu).unwrap();
    let (classes, names) = (set.classes(), set.prompt_names());
    let head = ZeroShotHead::with_prompt_names(&text, classes, names, set.templates().unwrap()).unwrap();
    assert_eq!(head.weights.dim(0).unwrap(), 1000);
}

#[test]
fn cifars_test_photos_are_a_set() {
    let Some(folder) = shared("cifar10") else { return };
    let set = open(&folder);
    assert_eq!((set.name(), set.items().len(), set.defects().len()), ("cifar10", 10_000, 0));
    assert_eq!(set.classes(), registry::entry("cifar10").unwrap().class_names.as_ref().unwrap());
    let mut histogram = [0; 10];
    labels(&set).into_iter().for_each(|label| histogram[label] += 1);
    assert_eq!(histogram, [1000; 10]);
    assert_eq!(set.digest(), open(&folder.join("test_batch.bin")).digest());
    let bytes = fs::read(folder.join("test_batch.bin")).unwrap();
    for index in [0, 1, 9_999] {
        let row = &bytes[3073 * index..3073 * (index + 1)];
        assert_eq!(set.items()[index].label, usize::from(row[0]));
        assert_eq!(picture(&set, index).get_pixel(5, 2).0, [0, 1024, 2048].map(|plane| row[1 + plane + 69]));
    }
}

#[test]
fn cifars_training_photos_in_a_tar_are_a_set() {
    let Some(file) = shared("cifar10/train-20k.tar") else { return };
    let set = open(&file);
    assert_eq!((set.items().len(), set.defects().len(), set.classes().len()), (20_000, 0, 10));
    assert_eq!(set.classes()[0], "airplane");
    let mut histogram = [0; 10];
    labels(&set).into_iter().for_each(|label| histogram[label] += 1);
    assert_eq!(histogram, [2000; 10]);
    assert_eq!(set.items()[2000].id, "train-20k.tar/automobile/0000.jpg");
    assert_eq!(picture(&set, 19_999).dimensions(), (32, 32));
}
