"""sayo_colab.ipynb: every code cell of the file runs in order, beside a fresh copy of the repository, on a CPU."""

import ast
import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.version import Version
from PIL import Image
from prepare_folders import build_refocus
from safetensors.torch import load_file

from data.check import CheckConfig
from evaluate import EvaluateConfig
from sayo.examples.load import load_examples
from sayo.settings import read_config
from train_rl import Config
from visualize import VisualizeConfig

ROOT = Path(__file__).parents[2]
FILE = ROOT / "sayo_colab.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = {cell.id: cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"}
TEXT = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
STEPS, TEST_QUESTIONS = 2, 16
RUN, DATA = "runs/notebook", "runs/notebook_data"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of the code, cells by id) after every cell, and the training cell once more for one more step."""
    content = tmp_path_factory.mktemp("content")
    folder = content / "sayo"  # the kernel starts beside it, as in Colab
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]  # what the next commit holds
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    notebook = nbformat.read(folder / FILE.name, as_version=4)
    afterwards = {"train-again": f"STEPS = {STEPS + 1}\n" + CODE["train"], "fails": 'run("false")'}
    notebook.cells += [nbformat.v4.new_code_cell(source, id=name) for name, source in afterwards.items()]
    environment = {"SAYO_NOTEBOOK_EMBEDDED": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "HOME": str(content)}
    environment |= {"SAYO_NOTEBOOK_STEPS": str(STEPS), "SAYO_NOTEBOOK_TEST_QUESTIONS": str(TEST_QUESTIONS)}
    environment |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    client = NotebookClient(notebook, timeout=2400, resources={"metadata": {"path": str(content)}})
    with client.setup_kernel(env=os.environ | environment), pytest.raises(CellExecutionError) as stopped:
        for index, cell in enumerate(notebook.cells):
            if cell.id == "train-again":
                shutil.copytree(folder / RUN, folder / "before")
            client.execute_cell(cell, index)
    assert cell.id == "fails" and stopped.value.evalue == "this command failed, see its output above: false"
    counts = [cell.execution_count for cell in notebook.cells if cell.id in CODE]
    assert counts == sorted(counts) and None not in counts and len(counts) == len(CODE)
    return folder, {cell.id: cell for cell in notebook.cells}


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream").replace("\r\n", "\n")


def shown(cell) -> Image.Image:
    """The one picture that a cell shows."""
    (picture,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    return Image.open(BytesIO(base64.b64decode(picture)))


def questions(folder: Path, name: str):
    return load_examples(str(folder / f"{name}_questions.jsonl"))


def test_test_questions_are_not_trained_on(run):
    folder, cells = run
    train, test = questions(folder / DATA, "train"), questions(folder / DATA, "test")
    assert f"{len(train)} questions to train on, {len(test)} to test with" in printed(cells["data"])
    assert (len(train), len(test)) == (600 - TEST_QUESTIONS, TEST_QUESTIONS)
    assert not {train.raw(i)["id"] for i in range(len(train))} & {test.raw(i)["id"] for i in range(len(test))}


def test_the_sheet_shows_regions_and_the_plan_covers_the_longest_question(run):
    sheet, plan = printed(run[1]["sheet"]), printed(run[1]["plan"])
    assert "good rows, 0 bad" in sheet and "image tokens in the region" in sheet
    colors = np.asarray(shown(run[1]["sheet"]).convert("RGB")).reshape(-1, 3)  # (pixels, 3)
    assert (colors == (0, 255, 0)).all(1).sum() > 100  # the frames of boxes
    longest = int(re.search(r"largest prompt +(\d+) tokens", plan)[1])
    sampled = int(re.search(r"^ +prompt tokens \(200 prompts\) +min .*, max (\d+)$", sheet, re.MULTILINE)[1])
    assert sampled <= longest < sampled + 10
    stages = re.search(r"^in all +(.*)$", plan, re.MULTILINE)[1].split()
    peak = re.search(r"^highest, in the [\w ]+? +([\d.]+) +of ([\d.]+)", plan, re.MULTILINE)
    highest, machine = map(float, peak.groups())
    left = float(re.search(r"^fits: ([\d.]+) GB are left$", plan, re.MULTILINE)[1])
    assert re.search("^MB ", plan, re.MULTILINE) and max(map(float, stages)) < highest < machine
    assert 1000 * left == pytest.approx(machine - highest, abs=20)


def test_training_resumes_when_its_cell_runs_again(run):
    folder, cells = run
    before, after = ((folder / name / "metrics.jsonl").read_text().splitlines() for name in ("before", RUN))
    assert after[:-1] == before  # with their times: the steps were not repeated
    assert [json.loads(line)["step"] for line in after] == list(range(1, STEPS + 2))
    former, weights = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("before", RUN))
    assert all((former[name] != weights[name]).any() for name in weights)
    assert re.search(r"train: 100%\|\S+\| 1/1 \[", printed(cells["train-again"]))  # one more step, not all three


def test_curves_samples_and_attention_are_of_this_run(run):
    folder, cells = run
    curves, look = shown(cells["curves"]).convert("RGB"), shown(cells["look"]).convert("RGB")
    assert curves.width > 1000 and len(curves.getcolors(1 << 24)) > 100
    for line in (folder / RUN / "samples.jsonl").read_text(encoding="utf-8").splitlines()[:STEPS]:
        sample = json.loads(line)
        best = max(range(len(sample["total"])), key=lambda number: (sample["total"][number], number))
        assert f"step {sample['step']}: {sample['question']}  (answer: {sample['answer']})" in printed(cells["samples"])
        assert f"accuracy {sample['accuracy'][best]:.2f}): {sample['texts'][best]}" in printed(cells["samples"])
    assert look.height > 900 and look.width > 900  # three test questions
    plain, before, after = np.array_split(np.asarray(look).astype(int), 3, axis=1)
    warm = [((part[..., 0] > 150) & (part[..., 2] < 110)).sum() for part in (plain, before, after)]
    assert warm[0] < warm[1] and warm[0] < warm[2]  # red where it looks, over the same three pictures


def test_the_report_is_in_the_notebook_and_in_a_file(run):
    folder, cells = run
    (page,) = [output.data["text/html"] for output in cells["explore"].outputs if "text/html" in output.get("data", {})]
    written = (folder / "runs/report.html").read_text(encoding="utf-8")
    assert html.unescape(page.split('srcdoc="')[1].split('" style=')[0]) == written
    assert "<html" in written and questions(folder / DATA, "test")[7]["question"] in written


def test_the_table_and_the_kept_adapter_agree_with_the_rows_of_the_evaluation(run):
    folder, cells = run
    rows = json.loads((folder / "runs/evaluation.json").read_text(encoding="utf-8"))["rows"]
    means = dict(re.findall(r"^(\w+) +(-?\d\.\d{3}) \[", printed(cells["evaluate"]), re.MULTILINE))
    for name in ("accuracy", "format", "tas", "tas_selected"):
        assert float(means[name]) == pytest.approx(np.mean([row[name] for row in rows["base"]]), abs=6e-4)
    assert re.search(r"base +adapter +difference", printed(cells["evaluate"]))
    with zipfile.ZipFile(folder / "runs/adapter.zip") as archive:
        name = "adapter_model.safetensors"
        assert archive.read(name) == (folder / "before/adapter" / name).read_bytes()
        assert json.loads(archive.read("adapter_config.json"))["peft_type"] == "LORA"
    example, first = questions(folder / DATA, "test")[0], rows["adapter"][0]
    assert first["id"] == example["id"]
    assert printed(cells["ask"]).strip().endswith(f"{example['question']}\n{first['text']}")
    assert shown(cells["ask"]).size == example["images"][0].size


def filled_in(cell: str, **fields) -> str:
    """A cell's source with other values in its form fields."""
    source = CODE[cell]
    for name, value in fields.items():
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.MULTILINE)
        assert count
    return source


def settings_with(**fields) -> dict:
    """The names that the settings cell defines, with other values in its form fields."""
    exec(filled_in("settings", **fields), names := {})
    return names


def shell(command: str, folder: Path | None = None) -> None:
    subprocess.run(command, shell=True, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for google.colab: the folders it mounts, and the files that a user chooses to upload."""
    calls = SimpleNamespace(mounted=[], chosen=[])
    calls.drive = SimpleNamespace(mount=calls.mounted.append)
    calls.files = SimpleNamespace(upload=lambda: dict.fromkeys(calls.chosen, b""))
    monkeypatch.setitem(sys.modules, "google.colab", calls)
    return calls


@pytest.mark.parametrize("source", ["clone", "zip of the files", "zip of a folder", "folder"])
def test_the_code_comes_from_an_address_a_zip_file_or_a_folder(source, tmp_path, monkeypatch, colab):
    code, content, archives = tmp_path / "code/sayo-main", tmp_path / "content", []
    shutil.copytree(ROOT / "sayo", code / "sayo")
    for name in ("train_rl.py", "requirements.txt"):
        (code / name).touch()
    content.mkdir()
    monkeypatch.chdir(content)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if source == "clone":
        shell("git init -q && git add . && git -c user.name=a -c user.email=a@b commit -qm a", code)
    elif source == "folder":
        shutil.copytree(code, "sayo")
    else:
        archives = [shutil.make_archive("sayo", "zip", code if "files" in source else code.parent)]
    names = settings_with(REPOSITORY=str(code) if source == "clone" else "", EMBEDDED=False) | {"run": shell}
    if archives:  # the upload is cancelled, and repeated
        with pytest.raises(FileNotFoundError, match="set REPOSITORY, or run this cell again"):
            exec(CODE["install"], names)
        assert Path.cwd() == content
    colab.chosen += archives
    for _ in range(2):  # the cell may run again
        with pytest.raises(RuntimeError, match="there is no GPU"):
            exec(CODE["install"], names)
        assert Path("train_rl.py").is_file() and Path("sayo/settings.py").is_file() and content in Path.cwd().parents
    assert Path(".git").exists() == (source == "clone")


def test_with_drive_the_run_is_written_there(monkeypatch, colab):
    monkeypatch.chdir(ROOT)
    names = settings_with(KEEP_ON_DRIVE=True, EMBEDDED=True)
    exec(CODE["install"], names | {"run": lambda command: None})
    assert colab.mounted == ["/content/drive"] and names["RUN"] == Path("/content/drive/MyDrive/sayo_run")


def test_the_charts_are_prepared_from_one_file_of_their_dataset(tmp_path, monkeypatch):
    part = Path(build_refocus(tmp_path / "hub", num_plain=300)[0]["data"]) / "data/train-00000-of-00003.parquet"
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names, **options: asked.append(names) or str(part))
    names = {"EMBEDDED": False, "DATA": tmp_path / "data", "TEST_QUESTIONS": 64, "Path": Path}
    exec(CODE["data"], names | {"run": lambda command: shell(command, ROOT)})
    assert asked == [("ReFocus/ReFocus_Data", "data/train-00002-of-00003.parquet")]
    train, test = (questions(tmp_path / "data", name) for name in ("train", "test"))
    assert len(test) == 64 and 0 < len(train) < 39  # 103 rows, of which the later ones show one and the same picture
    assert not set.intersection(*({part.raw(i)["images"][0] for i in range(len(part))} for part in (train, test)))


def test_an_adapter_goes_to_the_hub_and_its_token_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / RUN / "adapter").mkdir(parents=True)
    calls = []
    monkeypatch.setattr("getpass.getpass", lambda prompt: "hf_secret")
    for name in ("create_repo", "get_token", "login", "upload_folder"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *a, name=name, **k: calls.append((name, a, k)))
    exec(filled_in("keep", HUB_NAME="me/charts"), {"RUN": Path(RUN), "shutil": shutil, "os": os})
    assert [name for name, _, _ in calls] == ["get_token", "login", "create_repo", "upload_folder"]
    assert calls[1][2] == {"token": "hf_secret"} and calls[2][2]["private"] is True
    assert calls[3][2]["repo_id"] == "me/charts" and calls[3][2]["folder_path"] == Path(RUN, "adapter")
    assert "hf_secret" not in capsys.readouterr().out


def test_the_scripts_read_the_flags_for_a_t4(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    Path("runs").mkdir()
    for name in ("sheet", "look"):
        shutil.copy(ROOT / "docs/check.png", f"runs/{name}.png")
    commands, read = [], []
    data = {"TRAIN": Path("runs/train.jsonl"), "TEST": Path("runs/test.jsonl")}
    names = settings_with(EMBEDDED=False, STEPS=7) | data | {"run": commands.append}
    for name in ("sheet", "plan", "train", "look", "evaluate"):
        exec(CODE[name], names)
    scripts = {"train_rl.py": Config, "visualize.py": VisualizeConfig, "evaluate.py": EvaluateConfig}
    for command in commands:
        python, script, *flags = command.replace("-m data.check ", "data.check --data ").split()
        read.append(config := read_config(scripts.get(script, CheckConfig), flags))
        assert (python, config.model, config.dtype) == ("python", "Qwen/Qwen3-VL-2B-Instruct", "float16")
        assert config.load_in_4bit and config.max_pixels == read[0].max_pixels
    check, plan, train, look, evaluate = read
    assert (plan.plan, train.plan, train.max_steps, train.data) == (True, False, 7, check.data)
    assert look.data == evaluate.data == "runs/test.jsonl" and look.adapter == evaluate.adapter == f"{RUN}/adapter"
    assert evaluate.max_new_tokens == train.max_new_tokens


def test_the_file_is_valid_and_reads_as_a_diff():
    nbformat.validate(NOTEBOOK)
    assert FILE.read_text(encoding="utf-8") == nbformat.writes(NOTEBOOK) + "\n"
    assert len({cell.id for cell in NOTEBOOK.cells}) == len(NOTEBOOK.cells)
    for cell in NOTEBOOK.cells:
        assert re.fullmatch("[a-z-]+", cell.id) and not cell.metadata and cell.source == cell.source.strip()
        assert cell.cell_type == "markdown" or (cell.execution_count is None and cell.outputs == [])


def test_links_files_and_modules_that_the_text_names_exist():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) >= 3 and all(re.match(r"https://(arxiv\.org|huggingface\.co)/", link) for link in links)
    named = re.findall(r"`((?:\w+/)*\w+\.(?:md|py|txt|yaml))`", TEXT)
    modules = re.findall(r"python -m ((?:data|tools)[\w.]+)", FILE.read_text())
    named += [f"{name.replace('.', '/')}.py" for name in modules]
    assert {"docs/troubleshooting.md", "tests/scripts/test_notebook.py", "tools/merge.py"} <= set(named)
    assert all((ROOT / name).is_file() for name in named)
    assert not re.search("OWNER|colab-badge", FILE.read_text())  # there is no address yet


def test_only_the_requirements_are_installed():
    """And they accept the versions that Colab listed in June 2026: a newer PyTorch is gigabytes, and may not fit."""
    everything = "\n".join([*CODE.values(), TEXT])
    assert re.findall(r"pip3? install[^\n\"]*", everything) == ["pip install -q -r requirements.txt"]
    there = {"torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.0.2", "pillow": "11.3.0", "matplotlib": "3.10.0"}
    wanted = dict(re.findall(r"^(\w+)>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert [name for name, version in there.items() if Version(version) < Version(wanted[name])] == []


def test_paths_are_relative_or_those_of_colab_and_form_fields_have_their_type():
    paths = re.findall(r"(?<![\w.:/<}>*])/[A-Za-z][\w./-]*", "\n".join(CODE.values()))
    assert paths and all(path.startswith("/content/") for path in paths), paths
    kinds = dict.fromkeys(("EMBEDDED", "IN_4_BIT", "KEEP_ON_DRIVE"), "boolean")
    kinds |= {"STEPS": "integer", "TEST_QUESTIONS": "integer", "REPOSITORY": "string", "HUB_NAME": "string"}
    fields = re.findall(r"^(\w+) = (.+?)  # @param \{type:\"(\w+)\"\}$", "\n".join(CODE.values()), re.MULTILINE)
    assert {name: kind for name, _, kind in fields} == kinds
    for name, value, kind in fields:
        assert type(ast.literal_eval(value)) is {"boolean": bool, "integer": int, "string": str}[kind], name
