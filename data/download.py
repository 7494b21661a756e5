"""
Downloads: GLUE's archives and Hugging Face models. GLUE's files are checked in a scratch folder and
then moved into place, so they are complete or absent.
"""

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from data import InputError, locked

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
ARCHIVES = {"CoLA": "CoLA.zip", "SST-2": "SST-2.zip", "STS-B": "STS-B.zip", "MNLI": "MNLI.zip",
            "RTE": "RTE.zip", "WNLI": "WNLI.zip", "QQP": "QQP-clean.zip", "QNLI": "QNLIv2.zip"}
SHA256 = {  # as Hugging Face's datasets library recorded them
    "CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff",
    "SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
    "STS-B.zip": "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85",
    "QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
    "MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
    "QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5",
    "RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
    "WNLI.zip": "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46",
    "msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
}
LIMIT = 2 << 30  # bytes of an archive, and of its files; the largest, MNLI, has 0.3 and 1.3 GB


def fetch(url, file):
    """Downloads url to file, with a progress bar. InputError: the download failed, broke off or is
    not the expected file."""
    from tqdm import tqdm
    name, digest = url.rsplit("/", 1)[-1], hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(file, "wb") as out:
            if url.startswith("https:") and not response.url.startswith("https:"):
                raise InputError(f"{url}: was redirected to {response.url}, which is not https; "
                                 "not downloaded")
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=name) as bar:
                while block := response.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
                    if out.tell() > LIMIT:
                        raise InputError(f"{url}: larger than {LIMIT >> 20} MiB, not downloaded")
    except OSError as e:  # URLError and HTTPError among them
        raise InputError(f"{url}: download failed ({e}); check the connection, or put the files in "
                         "place by hand (--data)") from None
    found = os.path.getsize(file)
    if size and found != size:
        raise InputError(f"{url}: the download broke off after {found} of {size} bytes; run the "
                         "command again")
    if name in SHA256 and digest.hexdigest() != SHA256[name]:
        raise InputError(f"{url}: has the SHA-256 {digest.hexdigest()}, expected {SHA256[name]}; "
                         "not used. If you trust another copy, put the files in place by hand "
                         "(--data)")


def unpack(archive, name, folder):
    """The .tsv files of a GLUE archive, whose top folder is `name`, into `folder`."""
    try:
        with zipfile.ZipFile(archive) as z:
            wanted = []
            for member in z.infolist():
                path = Path(member.filename)
                if ".." in path.parts or path.is_absolute() or "\\" in member.filename:
                    raise InputError(f"{archive.name}: member {member.filename!r} points outside "
                                     "the archive; nothing was unpacked")
                if path.parent == Path(name) and path.suffix == ".tsv":
                    wanted.append(member)
            if sum(m.file_size for m in wanted) > LIMIT:
                raise InputError(f"{archive.name}: unpacks to more than {LIMIT >> 20} MiB; nothing "
                                 "was unpacked")
            for member in wanted:
                target = folder / Path(member.filename).name
                with z.open(member) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out)  # reading to the end checks the CRC
    # NotImplementedError: exotic compression; RuntimeError: encryption
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError,
            RuntimeError) as e:
        raise InputError(f"{archive.name}: not a sound zip archive ({e}); run the command "
                         "again") from None


def split_mrpc(scratch, folder):
    """GLUE's MRPC: Microsoft's training file; pairs in mrpc_dev_ids.tsv go to dev.tsv."""
    ids, pairs = ((scratch / name).read_text(encoding="utf-8")
                  for name in ("mrpc_dev_ids.tsv", "msr_paraphrase_train.txt"))
    dev_ids = {tuple(line.split("\t")) for line in ids.splitlines()}
    header, *rows = pairs.rstrip("\n").split("\n")
    parts = {"train.tsv": [], "dev.tsv": []}
    for row in rows:
        ids = tuple(row.split("\t")[1:3])
        parts["dev.tsv" if ids in dev_ids else "train.tsv"].append(row)
    for name, lines in parts.items():
        text = "\n".join([header, *lines]) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def download_task(name, into):
    """Puts GLUE's folder `name` (CoLA, SST-2 ..) with its train.tsv and dev files below `into`."""
    into = Path(into)
    with locked(into), tempfile.TemporaryDirectory(prefix=".download-", dir=into) as scratch:
        if (into / name).is_dir():  # under torchrun another process has downloaded it
            return
        scratch = Path(scratch)
        folder = scratch / name
        folder.mkdir()
        if name == "MRPC":
            fetch(MRPC_URL + "msr_paraphrase_train.txt", scratch / "msr_paraphrase_train.txt")
            fetch(GLUE_URL + "mrpc_dev_ids.tsv", scratch / "mrpc_dev_ids.tsv")
            split_mrpc(scratch, folder)
        else:
            archive = scratch / ARCHIVES[name]
            fetch(GLUE_URL + ARCHIVES[name], archive)
            unpack(archive, name, folder)
        if not (folder / "train.tsv").is_file():
            raise InputError(f"{GLUE_URL}{ARCHIVES.get(name, '')}: holds no {name}/train.tsv; "
                             "nothing was put in place")
        os.replace(folder, into / name)


def model_folder(name):
    """The folder of a model: `name` itself, or a download of it from the Hugging Face hub."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"--model {name}: no such folder; expected a folder in Hugging Face "
                         "layout or a hub name such as roberta-base")
    from huggingface_hub import snapshot_download
    # all files that model.py and batching.py may read
    wanted = ["model*.safetensors", "model.safetensors.index.json", "config.json",
              "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "added_tokens.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # the hub client's errors are many, and all mean the same here
        reason = str(e).strip().split("\n")[0]
        raise InputError(f"--model {name}: no such folder, and it could not be downloaded from the "
                         f"Hugging Face hub ({type(e).__name__}: {reason}): give a folder, or "
                         "check name and connection") from None
