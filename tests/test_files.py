"""Every writer replaces files and folders atomically: they appear complete or not at all."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
from checks import once

import keras_jamba
from keras_jamba import _files, tokenizers, visualize
from keras_jamba._triton import tuning
from keras_jamba.training.checkpointing import _snapshots

resource = pytest.importorskip("resource")
# Independent of the backend.
pytestmark = once


def content(folder):
    """Returns `{name: bytes}` of everything in a folder, with None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_appears_only_when_it_is_complete(tmp_path, kind, is_there):
    file = tmp_path / "file.txt"
    if is_there:
        file.write_text("old")
    with _files.atomic_file(kind(file)) as staged:
        assert staged.suffix == ".txt" and staged.name == "file.txt"
        staged.write_text("new")
        assert file.exists() == is_there and (not is_there or file.read_text() == "old")
    assert content(tmp_path) == {"file.txt": b"new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("is_there", [False, True])
def test_an_interrupted_file_leaves_the_old_content(tmp_path, error, is_there):
    if is_there:
        (tmp_path / "file").write_bytes(b"old")
    before = content(tmp_path)
    with pytest.raises(error), _files.atomic_file(tmp_path / "file") as staged, open(staged, "wb") as stream:
        stream.write(b"half")
        raise error
    assert content(tmp_path) == before


@pytest.mark.parametrize("writer", [_files.atomic_file, _files.atomic_folder, _files.atomic_files])
def test_a_missing_parent_folder_is_created(tmp_path, writer):
    with writer(tmp_path / "a" / "b") as staged:
        (staged if writer is _files.atomic_file else staged / "c").write_text("new")
    expected = {"a": None, "a/b": b"new"} if writer is _files.atomic_file else {"a": None, "a/b": None, "a/b/c": b"new"}
    assert content(tmp_path) == expected


def test_a_file_keeps_the_old_permissions_or_follows_the_umask(tmp_path):
    mode = lambda: (tmp_path / "file").stat().st_mode & 0o777  # noqa: E731

    def write():
        with _files.atomic_file(tmp_path / "file") as staged:
            staged.touch(0o600)

    before = os.umask(0o027)
    try:
        write()
        assert mode() == 0o640
        (tmp_path / "file").chmod(0o604)
        write()
        assert mode() == 0o604
    finally:
        os.umask(before)


def test_a_link_is_followed_and_the_staged_file_has_its_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.keras").symlink_to(tmp_path / "folder" / "blob")
    with _files.atomic_file(tmp_path / "link.keras") as staged:
        assert staged.name == "link.keras"
        staged.write_text("new")
    assert (tmp_path / "link.keras").is_symlink() and (tmp_path / "folder" / "blob").read_text() == "new"


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_pipe_is_written_and_never_replaced(tmp_path, through_a_link):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if through_a_link:
        (tmp_path / "link").symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with _files.atomic_file(tmp_path / "link" if through_a_link else pipe) as staged:
            (tmp_path / "other").write_text("new")
            os.replace(tmp_path / "other", staged)
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError), _files.atomic_file(tmp_path / "b") as staged:
        staged.write_text("new")
    with pytest.raises(IsADirectoryError, match="/b"), _files.atomic_files(tmp_path) as staged:
        for name in ("a", "b"):
            (staged / name).write_text("new")
    assert content(tmp_path) == {"b": None}


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", ".unfinished-file")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(PermissionError, match=f"must be writable: '{tmp_path}/file'$"):
        with _files.atomic_file(tmp_path / "file") as staged:
            staged.write_text("new")


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path):
        with pytest.raises(ValueError, match="working directory"), _files.atomic_folder(path):
            pass
    assert tmp_path.samefile(".") and content(tmp_path) == {}


def test_files_of_a_folder_have_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        with _files.atomic_folder(tmp_path / "file") as staged:
            (staged / "file").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file" / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_appears_only_when_it_is_complete(tmp_path, kind):
    with _files.atomic_folder(kind(tmp_path / "folder")) as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "file").write_text("new")
        assert not (tmp_path / "folder").exists()
    assert content(tmp_path) == {"folder": None, "folder/inner": None, "folder/inner/file": b"new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("replaces", [False, True])
def test_an_interrupted_folder_leaves_the_old_content(tmp_path, error, replaces):
    (tmp_path / "folder").mkdir()
    if replaces:
        (tmp_path / "folder" / "file").write_text("old")
    before = content(tmp_path)
    with pytest.raises(error), _files.atomic_folder(tmp_path / "folder", replaces) as staged:
        (staged / "file").write_text("half")
        raise error
    assert content(tmp_path) == before


def test_a_non_empty_folder_is_replaced_only_on_request(tmp_path):
    def write(text, replaces):
        with _files.atomic_folder(tmp_path / "folder", replaces) as staged:
            (staged / text).write_text(text)

    write("first", replaces=False)
    with pytest.raises(OSError):
        write("second", replaces=False)
    assert content(tmp_path) == {"folder": None, "folder/first": b"first"}
    write("third", replaces=True)
    assert content(tmp_path) == {"folder": None, "folder/third": b"third"}


@pytest.mark.parametrize("stop", range(3))
def test_restore_recovers_a_folder_from_an_interrupted_replacement(tmp_path, monkeypatch, stop):
    """Interrupts the replacement before each rename, and after the last one."""
    with _files.atomic_folder(tmp_path / "folder") as staged:
        (staged / "file").write_text("old")
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) > stop:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        with _files.atomic_folder(tmp_path / "folder", replaces=True) as staged:
            (staged / "file").write_text("new")
    assert (tmp_path / "folder").exists() == (stop != 1)
    _files.restore(tmp_path)
    assert content(tmp_path) == {"folder": None, "folder/file": b"old" if stop < 2 else b"new"}


def test_several_files_appear_together_beside_existing_files(tmp_path):
    for name in ("kept", "changed"):
        (tmp_path / name).write_text("old")
    before = content(tmp_path)
    with pytest.raises(KeyboardInterrupt), _files.atomic_files(tmp_path) as staged:
        (staged / "changed").write_text("new")
        raise KeyboardInterrupt
    assert content(tmp_path) == before
    with _files.atomic_files(tmp_path) as staged:
        (staged / "changed").write_text("new")
        (staged / "inner").mkdir()
        (staged / "inner" / "file").write_text("new")
    assert content(tmp_path) == before | {"changed": b"new", "inner": None, "inner/file": b"new"}


@contextlib.contextmanager
def full_disk(size):
    """Limits every file to `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def language(adapted=False):
    model = keras_jamba.JambaCausalLM(vocab_size=11, d_model=16, num_layers=1, moe_frequency=0, dt_rank=1)
    model.tokenizer = tokenizers.ByteTokenizer()
    if adapted:
        model.enable_lora(2)
    return model


def jamba_tokenizer(folder):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdefgh")}, merges=[])).save(str(folder / "made.json"))
    (folder / "made.json").rename(folder / "tokenizer.json")
    return tokenizers.JambaTokenizer(folder)


def keep_a_choice(folder, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(folder))
    return lambda: tuning._keep("a key", list(range(99)))


def draw(file):
    images = np.random.default_rng(0).random((1, 8, 8, 1), "float32")
    sizes = dict(num_classes=3, image_shape=(8, 8, 1), d_model=8, num_layers=1, moe_frequency=0, downsample=2)
    model = keras_jamba.DHCJamba(**sizes)
    return lambda: visualize.draw_token_order(model, images, file=file)


# `{name: function}`. The function returns a writer into a folder.
WRITERS = {
    "a prompt's state": lambda folder, patch: partial(language().prefill([1, 2]).save, folder / "state"),
    "adapters": lambda folder, patch: partial(language(adapted=True).save_lora, folder / "adapters.safetensors"),
    "adapters for PEFT": lambda folder, patch: partial(language(adapted=True).export_lora_to_peft, folder / "peft"),
    "a checkpoint of transformers": lambda folder, patch: partial(language().export_to_transformers, folder / "theirs"),
    "a tokenizer of bytes": lambda folder, patch: partial(
        tokenizers.save_tokenizer, tokenizers.ByteTokenizer(False), folder
    ),
    "a tokenizer": lambda folder, patch: partial(jamba_tokenizer(folder.parent).save, folder),
    "a measured choice": keep_a_choice,
    "a picture": lambda folder, patch: draw(folder / "picture.svg"),
    "a picture without an ending": lambda folder, patch: draw(folder / "picture"),
    "a snapshot": lambda folder, patch: partial(
        _snapshots.write, folder, 1, [_snapshots.as_single_shard(np.arange(99))], {"state": "new"}
    ),
}
# These writers refuse a folder that holds files.
INTO_NEW_FOLDERS = ("adapters for PEFT", "a checkpoint of transformers")
# This writer continues without its file.
SILENT = ("a measured choice",)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_files_and_no_leftovers(tmp_path, monkeypatch, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    write = WRITERS[name](folder, monkeypatch)
    write()
    written = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in written)
    assert written and not any(path.name.startswith(".") for path in folder.rglob("*"))
    for path in written:
        if name in INTO_NEW_FOLDERS:
            path.unlink()
        else:
            path.write_bytes(b"old")
    before = content(folder)
    with full_disk(largest // 2), contextlib.nullcontext() if name in SILENT else pytest.raises(Exception) as caught:
        write()
    assert name in SILENT or "large" in str(caught.value) or "os error 27" in str(caught.value).lower(), caught
    assert content(folder) == before


def test_a_preset_on_a_disk_that_is_full_at_any_byte_raises_an_error(tmp_path):
    # In another process, which HDF5 would crash.
    program = (
        "import resource, sys, keras_jamba\n"
        "folder, limits = sys.argv[1], map(int, sys.argv[2:])\n"
        "model = keras_jamba.JambaCausalLM(vocab_size=11, d_model=16, num_layers=1, moe_frequency=0, dt_rank=1)\n"
        "for limit in limits:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        model.save_to_preset(folder)\n"
        "    except OSError:\n"
        "        print('refused', flush=True)\n"
    )
    limits = [0, 100, 800, 2048, 4096, 9000, 20_000, 30_000]
    command = [sys.executable, "-c", program, str(tmp_path / "preset"), *map(str, limits)]
    environment = os.environ | {"KERAS_BACKEND": keras.backend.backend()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["refused"] * len(limits), done.stderr[-2000:]
    assert content(tmp_path) == {}


def test_a_preset_that_fails_at_its_last_file_leaves_an_empty_folder(tmp_path, monkeypatch):
    """Fails in the tokenizer's writer, because HDF5 may end the process on a full disk."""

    def full(tokenizer, folder):
        assert {path.name for path in folder.iterdir()} == {"model.weights.h5"}
        raise OSError("No space left on device")

    (tmp_path / "preset").mkdir()
    monkeypatch.setattr("keras_jamba.models._checkpoints.save_tokenizer", full)
    with pytest.raises(OSError, match="No space left"):
        language().save_to_preset(tmp_path / "preset")
    assert content(tmp_path) == {"preset": None}


@pytest.mark.parametrize("kind", [str, Path])
def test_an_interrupted_keras_file_leaves_the_old_file(tmp_path, monkeypatch, kind):
    def full(tokenizer, folder):
        raise OSError("No space left on device")

    model, file = language(), tmp_path / "model.keras"
    model.save(kind(file))
    before = content(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("keras_jamba.models._checkpoints.save_tokenizer", full)
        model.save(kind(file))
    assert content(tmp_path) == before
    model.save(kind(file), True)
    assert keras.saving.load_model(file).get_config() == model.get_config()


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("folder.keras", dict(zipped=False), "should not end in `.keras`. Received: filepath=.*/folder.keras"),
        ("model.zip", {}, "Received: filepath=.*/model.zip"),
    ],
)
def test_path_errors_of_keras_name_the_given_path(tmp_path, name, given, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        language().save(tmp_path / name, **given)
    assert "unfinished" not in str(caught.value) and content(tmp_path) == {}


def test_an_invalid_template_name_leaves_the_tokenizer_files_unchanged(tmp_path):
    tokenizer = jamba_tokenizer(tmp_path)
    tokenizer.chat_template = {"default": "a", "../../outside": "b"}
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "tokenizer.json").write_text("old")
    with pytest.raises(ValueError, match="must be the name of a file"):
        tokenizer.save(tmp_path / "saved")
    assert content(tmp_path / "saved") == {"tokenizer.json": b"old"}


def test_json_files_keep_their_formatting(tmp_path):
    _files.write_json(tmp_path / "a", {"b": "é"})
    assert (tmp_path / "a").read_text("utf-8") == '{\n  "b": "\\u00e9"\n}\n'
    _files.write_json(tmp_path / "a", {"b": "é", "a": 1}, indent=None, ensure_ascii=False, sort_keys=True)
    assert (tmp_path / "a").read_text("utf-8") == json.dumps({"a": 1, "b": "é"}, ensure_ascii=False) + "\n"
