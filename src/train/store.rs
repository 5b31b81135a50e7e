use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use image::RgbImage;

use crate::image::rgb_from_pixels;
use crate::{Error, Result};

/// Pictures of one size in a file, one after the other as rows of RGB bytes.
pub(super) struct Store {
    path: PathBuf,
    file: File,
    width: usize,
    height: usize,
    pictures: usize,
}

impl Store {
    pub(super) fn create(path: &Path, width: usize, height: usize) -> Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::write(path, e)),
            _ => Self::open_or_create(path, width, height),
        }
    }

    /// What was written of a file, if there is one; a picture that was cut off is dropped.
    pub(super) fn open_or_create(path: &Path, width: usize, height: usize) -> Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = file.map_err(|e| Error::write(path, e))?;
        let size = file.metadata().map_err(|e| Error::read(path, e))?.len();
        let one = (3 * width * height) as u64;
        let pictures = size / one;
        if size > pictures * one {
            file.set_len(pictures * one).map_err(|e| Error::write(path, e))?;
        }
        Ok(Self { path: path.to_path_buf(), file, width, height, pictures: pictures as usize })
    }

    /// Drops what is behind the last whole group of `n` pictures: pictures are crafted in groups, and
    /// the last bits of one may depend on its group.
    pub(super) fn cut_to_groups(&mut self, n: usize) -> Result<()> {
        self.pictures -= self.pictures % n.max(1);
        let size = (self.pictures * 3 * self.width * self.height) as u64;
        self.file.set_len(size).map_err(|e| Error::write(&self.path, e))
    }

    /// How many pictures it has.
    pub(super) fn len(&self) -> usize {
        self.pictures
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let one = 3 * self.width * self.height;
        if bytes.len() != one {
            return Err(Error::argument("picture", format!("{one} bytes"), bytes.len()));
        }
        self.file.write_all(bytes).map_err(|e| Error::write(&self.path, e))?;
        self.pictures += 1;
        Ok(())
    }

    /// Waits until all of it is on the disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::write(&self.path, e))
    }

    pub(super) fn picture(&self, row: usize) -> Result<RgbImage> {
        let mut bytes = vec![0; 3 * self.width * self.height];
        let at = (row * bytes.len()) as u64;
        let mut file = &self.file;
        let read = file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|e| Error::read(&self.path, e))?;
        let picture = RgbImage::from_raw(self.width as u32, self.height as u32, bytes);
        picture.ok_or_else(|| Error::config(&self.path, format!("picture {row} has another size")))
    }
}

/// The bytes of pixels `(3, H, W)` that are 8-bit values.
pub(super) fn bytes(pixels: &Tensor) -> Result<Vec<u8>> {
    Ok(rgb_from_pixels(pixels)?.into_raw())
}
