//! What a file holds that is not what its name says: pointers, web pages, archives.

use serde_json::{Map, Value};
use std::path::Path;

const LFS: &str = "it is a Git LFS pointer and not the file itself: run `git lfs pull` in its \
    repository, or download the file again";
const PAGE: &str = "it is a web page that was saved in the file's place (a login or an error \
    page): download the file again";
const XML: &str = "it is XML that was saved in the file's place (a server's error): download the \
    file again";
const ZIP: &str = "it is a zip archive, as PyTorch's and NumPy's files are: only safetensors are \
    read, so save the model with `save_pretrained` of transformers";
const PICKLE: &str = "it is a Python pickle, which can run code and is not read: save the model as \
    safetensors, with `save_pretrained` of transformers";
const GGUF: &str = "it is a GGUF file of llama.cpp, which is not supported: take the model's \
    safetensors, which its model card names";
const PACKED: &str = "it is a compressed archive: unpack it";
const UTF_16: &str = "it is text in UTF-16: save it in UTF-8";

/// The first bytes of files that come in others' places.
const SIGNS: [(&[u8], &str); 29] = [
    (b"version https://git-lfs.github.com/", LFS),
    (b"version https://hawser.github.com/", LFS),
    (b"# xet version", "it is a Xet pointer and not the file itself: download the file again"),
    (b"/annex/objects/", "it is a git-annex pointer and not the file itself: run `git annex get`"),
    (b"<!doctype html", PAGE),
    (b"<html", PAGE),
    (b"<head", PAGE),
    (b"<?xml", XML),
    (b"<error>", XML),
    (b"pk\x03\x04", ZIP),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"gguf", GGUF),
    (b"ggml", GGUF),
    (b"tjgg", GGUF),
    (b"lmgg", GGUF),
    (b"\x93numpy", "it is an array of NumPy: only safetensors are read"),
    (b"\x89hdf", "it is an HDF5 file of Keras: only safetensors are read"),
    (b"\x1f\x8b", PACKED),
    (b"\xfd7zxz", PACKED),
    (b"\x28\xb5\x2f\xfd", PACKED),
    (b"\x04\x22\x4d\x18", PACKED),
    (b"7z\xbc\xaf\x27\x1c", PACKED),
    (b"rar!\x1a\x07", PACKED),
    (b"bzh", PACKED),
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
];

/// Bytes that tell what a file is.
pub const HEAD: usize = 1024;

/// What a file of fields or text is instead, and what to do. `bytes`: the file's first, or all
pub fn mistaken(bytes: &[u8]) -> Option<String> {
    let head = &bytes[..bytes.len().min(HEAD)];
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let begins = |bytes: &[u8], sign: &[u8]| {
        bytes.get(..sign.len()).is_some_and(|bytes| bytes.eq_ignore_ascii_case(sign))
    };
    if let Some((_, what)) = SIGNS.iter().find(|(sign, _)| begins(text, sign) || begins(head, sign))
    {
        return Some((*what).into());
    }
    if head.len() > 8 && head.iter().all(|byte| *byte == 0) {
        return Some("it begins with zeros alone: the download has not ended, try again".into());
    }
    is_answer(bytes).then(|| {
        let said = text.iter().take(200).copied().collect::<Vec<_>>();
        let said = String::from_utf8_lossy(&said).trim_end().to_owned();
        format!("it is a server's answer that was saved in the file's place: {said}")
    })
}

/// What a file is instead that should begin with eight bytes of a number, as safetensors do.
pub fn mistaken_tensors(bytes: &[u8]) -> Option<String> {
    if bytes.is_empty() {
        return Some("it is empty: the download or the copy has not ended, try again".into());
    }
    mistaken(bytes).or_else(|| {
        let head = bytes.get(..8).unwrap_or(bytes);
        let text = head.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r'));
        text.then(|| {
            let said = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]);
            format!("it is text that begins with {:?}: download the file again", said.trim_end())
        })
    })
}

/// Whether a small JSON object says nothing but what went wrong.
fn is_answer(bytes: &[u8]) -> bool {
    const WORDS: [&str; 9] =
        ["error", "errors", "message", "detail", "status", "statusCode", "code", "path", "url"];
    if bytes.len() > 4 * HEAD || !bytes.trim_ascii_start().starts_with(b"{") {
        return false;
    }
    let fields: Map<String, Value> = serde_json::from_slice(bytes).unwrap_or_default();
    let says =
        ["error", "errors", "message", "detail"].iter().any(|word| fields.contains_key(*word));
    says && fields.keys().all(|field| WORDS.contains(&field.as_str()))
}

/// A folder's files that are a model in another format, and what to do about it.
pub fn other_formats(folder: &Path) -> Option<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .ok()?
        .take(10_000)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    let (_, advice) = FORMATS.iter().find(|(is, _)| names.iter().any(|name| is(name)))?;
    let known = |name: &&String| FORMATS.iter().any(|(is, _)| is(name));
    let there: Vec<String> =
        names.iter().filter(known).take(3).map(|name| format!("`{name}`")).collect();
    Some(format!("there is only {}: {advice}", there.join(", ")))
}

type Format = (fn(&str) -> bool, &'static str);

/// By their names, what is most likely meant first.
const FORMATS: [Format; 13] = [
    (
        |name| matches!(name, "adapter_config.json" | "adapters.safetensors"),
        "this is an adapter, which goes onto a model: `Bombus.load_adapter`",
    ),
    (
        |name| name == "snapshots",
        "this is a folder of the Hub's cache, whose models are in `snapshots/<commit>`; or give \
         `{:hf, \"owner/name\"}`",
    ),
    (
        |name| has_end(name, &[".incomplete", ".part", ".partial", ".aria2", ".crdownload"]),
        "the download has not ended: try again",
    ),
    (
        |name| has_end(name, &[".gguf", ".ggml"]),
        "GGUF is llama.cpp's format, which is not supported: take the repository with the model's \
         safetensors, which the model card names",
    ),
    (
        |name| name.starts_with("consolidated") && has_end(name, &[".pth", ".safetensors"]),
        "this is the format of the model's makers: take its files for transformers \
         (`config.json`, `model*.safetensors`), or convert it with the script for it in transformers",
    ),
    (
        |name| has_end(name, &[".bin", ".pt", ".pth", ".ckpt", ".pkl"]),
        "PyTorch's pickles can run code and are not read: in Python, \
         `transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)` \
         writes safetensors",
    ),
    (
        |name| has_end(name, &[".npz", ".npy"]),
        "NumPy's files are MLX's old format: convert the original model with `mlx_lm.convert`",
    ),
    (
        |name| has_end(name, &[".h5", ".keras", ".msgpack", ".ot", ".index"]),
        "weights of TensorFlow, Flax or Rust are not read: in Python, \
         `transformers.AutoModelForCausalLM.from_pretrained(folder, from_tf=True)` (or `from_flax`) \
         and `save_pretrained` write safetensors",
    ),
    (
        |name| {
            has_end(name, &[".onnx", ".onnx_data", ".tflite", ".mlpackage", ".mlmodelc", ".xml"])
        },
        "a compiled graph cannot be loaded: take the model's safetensors",
    ),
    (
        |name| has_end(name, &[".engine", ".plan", ".litertlm", ".task", ".pte", ".nemo"]),
        "a compiled model cannot be loaded: take the model's safetensors",
    ),
    (|name| has_end(name, &[".zip", ".tar", ".gz", ".tgz", ".zst", ".xz", ".7z"]), "unpack it"),
    (
        |name| has_end(name, &[".safetensors"]) && !name.starts_with("model"),
        "a model's files are called `model.safetensors` or `model-00001-of-00002.safetensors`: \
         rename it if it is the whole model",
    ),
    (|name| name == "tokenizer.json", "this is a tokenizer, and the model's weights are elsewhere"),
];

fn has_end(name: &str, ends: &[&str]) -> bool {
    let name = name.to_ascii_lowercase();
    ends.iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_panics(bytes in any::<Vec<u8>>()) {
            _ = (mistaken(&bytes), mistaken_tensors(&bytes));
        }
    }

    #[test]
    fn what_is_no_model_file_is_recognized() {
        for (bytes, word) in [
            (
                &b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"[..],
                "git lfs pull",
            ),
            (b"\n <!DOCTYPE HTML><html>", "web page"),
            (b"\xef\xbb\xbf<html lang='en'>", "web page"),
            (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
            (b"PK\x03\x04archive/data.pkl", "zip"),
            (b"\x80\x02}q\x00", "pickle"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"\x1f\x8b\x08\0", "compressed"),
            (b"\xff\xfe{\0", "UTF-16"),
            (br#"{"error": "Repository not found"}"#, "Repository not found"),
            (&[0; 64], "zeros"),
        ] {
            let said = mistaken(bytes).unwrap();
            assert!(said.contains(word), "{said}");
            assert!(mistaken_tensors(bytes).is_some());
        }
        assert!(mistaken_tensors(b"Entry not found").unwrap().contains("Entry not found"));
        assert!(mistaken_tensors(b"").unwrap().contains("empty"));
    }

    #[test]
    fn what_is_in_its_place_is_left_alone() {
        for bytes in [
            &br#"{"model_type": "qwen3", "error": 1}"#[..],
            b"{}",
            b"{{ messages[0].content }}",
            b"{% for message in messages %}",
            b"#version: 0.2",
            b"",
        ] {
            assert_eq!(mistaken(bytes), None);
        }
        assert_eq!(mistaken_tensors(b"\x40\0\0\0\0\0\0\0{\"a\":{}}"), None);
    }

    #[test]
    fn folders_of_other_formats_are_named() {
        for (files, word) in [
            (&["config.json", "pytorch_model.bin"][..], "save_pretrained"),
            (&["qwen.Q4_K_M.gguf"], "llama.cpp"),
            (&["weights.npz"], "mlx_lm.convert"),
            (&["consolidated.00.pth", "params.json"], "makers"),
            (&["adapter_config.json", "adapter_model.bin"], "load_adapter"),
            (&["tf_model.h5"], "TensorFlow"),
            (&["weights.safetensors"], "rename"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            for file in files {
                std::fs::write(folder.path().join(file), "").unwrap();
            }
            let said = other_formats(folder.path()).unwrap();
            assert!(said.contains(word) && said.contains('`'), "{said}");
        }
        assert_eq!(other_formats(tempfile::tempdir().unwrap().path()), None);
    }
}
