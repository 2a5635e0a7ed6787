"""sayo_colab.ipynb as a reader runs it: every code cell of the file, in order, in a fresh copy, embedded policy."""

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
from types import ModuleType

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.version import Version
from PIL import Image
from prepare_folders import build_refocus
from safetensors.torch import load_file

from config import read_config
from data.check import CheckConfig
from data.examples import load_examples
from evaluate import EvaluateConfig
from train_rl import Config
from visualize import VisualizeConfig

ROOT = Path(__file__).parent.parent
FILE = ROOT / "sayo_colab.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = {cell.id: cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"}
TEXT = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
STEPS, TEST_QUESTIONS = 2, 16
AFTERWARDS = {"train-again": f"STEPS = {STEPS + 1}\n" + CODE["train"], "fails": 'run("false")'}


def copy_of_the_repository(folder: Path) -> Path:
    """The files that git knows or would add, as they are now: what a clone of the next commit holds."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, cells by id) of the executed notebook; then its training cell was run again, for one more step."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("notebook"))
    notebook = nbformat.read(folder / FILE.name, as_version=4)
    num_cells = len(notebook.cells)
    for identifier, source in AFTERWARDS.items():
        notebook.cells.append(nbformat.v4.new_code_cell(source, id=identifier))
    environment = {
        "SAYO_NOTEBOOK_EMBEDDED": "1",
        "SAYO_NOTEBOOK_STEPS": str(STEPS),
        "SAYO_NOTEBOOK_TEST_QUESTIONS": str(TEST_QUESTIONS),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "HOME": str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel(env=os.environ | environment):
        for index, cell in enumerate(notebook.cells[:num_cells]):
            client.execute_cell(cell, index)
        (folder / "before").mkdir()
        for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
            shutil.copy(folder / "runs/notebook" / name, folder / "before")
        client.execute_cell(notebook.cells[num_cells], num_cells)
        with pytest.raises(CellExecutionError) as stopped:
            client.execute_cell(notebook.cells[num_cells + 1], num_cells + 1)
    assert stopped.value.evalue == "this command stopped, for the reason above: false"
    cells = {cell.id: cell for cell in notebook.cells}
    return folder, cells


def said(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream").replace("\r\n", "\n")


def shown(cell) -> Image.Image:
    """The one picture that a cell shows."""
    (picture,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    return Image.open(BytesIO(base64.b64decode(picture)))


# --- what the cells do -------------------------------------------------------------------------------------------


def test_every_code_cell_is_executed(run):
    counts = [run[1][name].execution_count for name in CODE]
    assert counts == sorted(counts) and None not in counts and len(counts) == len(CODE)


def test_questions_to_test_with_are_not_trained_on(run):
    folder, cells = run
    train, test = (
        load_examples(str(folder / f"runs/notebook_data/{name}_questions.jsonl")) for name in ("train", "test")
    )
    assert f"{len(train)} questions to train on, {len(test)} to test with" in said(cells["data"])
    assert (len(train), len(test)) == (600 - TEST_QUESTIONS, TEST_QUESTIONS)
    assert not {train.peek(i)["id"] for i in range(len(train))} & {test.peek(i)["id"] for i in range(len(test))}


def test_the_sheet_shows_boxes_and_covered_tokens(run):
    cell = run[1]["sheet"]
    assert re.search(r"good rows, 0 bad", said(cell)) and "image tokens in the region" in said(cell)
    colors = np.asarray(shown(cell).convert("RGB")).reshape(-1, 3)  # (pixels, 3)
    assert (colors == (0, 255, 0)).all(1).sum() > 100  # the frames of boxes


def test_the_plan_says_what_the_longest_question_takes(run):
    text = said(run[1]["plan"])
    longest = re.search(r"largest prompt +(\d+) tokens", text)[1]
    some = re.search(
        r"^ +prompt tokens \(200 prompts\) +min \d+, median \S+, max (\d+)$", said(run[1]["sheet"]), re.MULTILINE
    )
    assert int(some[1]) <= int(longest) < int(some[1]) + 10
    stages = [float(number) for number in re.search(r"^in all +(.*)$", text, re.MULTILINE)[1].split()]
    highest, machine = map(
        float, re.search(r"^highest, in the [\w ]+? +([\d.]+) +of ([\d.]+)", text, re.MULTILINE).groups()
    )
    assert re.search("^MB ", text, re.MULTILINE)
    left = float(re.search(r"^fits: ([\d.]+) GB are left$", text, re.MULTILINE)[1])
    assert max(stages) < highest < machine and 1000 * left == pytest.approx(machine - highest, abs=20)


def test_the_run_goes_on_when_its_cell_is_run_again(run):
    folder, cells = run
    before, after = (folder / name / "metrics.jsonl" for name in ("before", "runs/notebook"))
    lines = after.read_text(encoding="utf-8").splitlines()
    assert lines[:-1] == before.read_text(encoding="utf-8").splitlines()  # not made again: they say how long they took
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 2))
    former, weights = (
        load_file(folder / f"{name}/adapter_model.safetensors") for name in ("before", "runs/notebook/adapter")
    )
    assert all((former[name] != weights[name]).any() for name in weights)
    assert re.search(r"train: 100%\|\S+\| 1/1 \[", said(cells["train-again"]))  # one more step, not all three


def test_curves_and_samples_are_of_this_run(run):
    folder, cells = run
    picture = shown(cells["curves"])
    assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 100
    samples = [
        json.loads(line) for line in (folder / "runs/notebook/samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for sample in samples[:STEPS]:
        best = max(range(len(sample["total"])), key=lambda number: (sample["total"][number], number))
        assert f"step {sample['step']}: {sample['question']}  (right: {sample['answer']})" in said(cells["samples"])
        assert f"accuracy {sample['accuracy'][best]:.2f}): {sample['texts'][best]}" in said(cells["samples"])


def test_attention_is_shown_for_three_test_questions_twice(run):
    folder, cells = run
    picture = shown(cells["look"]).convert("RGB")
    assert picture.height > 900 and picture.width > 900
    plain, before, after = np.array_split(np.asarray(picture).astype(int), 3, axis=1)
    warm = [((part[..., 0] > 150) & (part[..., 2] < 110)).sum() for part in (plain, before, after)]
    assert warm[0] < warm[1] and warm[0] < warm[2]  # red where it looks, over the same three pictures


def test_the_report_is_in_the_notebook_and_in_a_file(run):
    folder, cells = run
    (page,) = [output.data["text/html"] for output in cells["explore"].outputs if "text/html" in output.get("data", {})]
    written = (folder / "runs/report.html").read_text(encoding="utf-8")
    assert html.unescape(page.split('srcdoc="')[1].split('" style=')[0]) == written
    question = load_examples(str(folder / "runs/notebook_data/test_questions.jsonl"))[7]["question"]
    assert "<html" in written and question in written


def test_the_table_says_what_the_answers_give(run):
    folder, cells = run
    result = json.loads((folder / "runs/evaluation.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^(\w+) +(-?\d\.\d{3}) \[", said(cells["evaluate"]), re.MULTILINE)
    metrics = {name: float(mean) for name, mean in rows}
    for name in ("accuracy", "format", "tas", "tas_selected"):
        assert metrics[name] == pytest.approx(
            sum(row[name] for row in result["rows"]["base"]) / TEST_QUESTIONS, abs=6e-4
        )
    assert re.search(r"base +adapter +difference", said(cells["evaluate"]))


def test_the_kept_adapter_is_the_trained_one_and_answers_as_it_did(run):
    folder, cells = run
    with zipfile.ZipFile(folder / "runs/adapter.zip") as archive:
        assert archive.read("adapter_model.safetensors") == (folder / "before/adapter_model.safetensors").read_bytes()
        assert json.loads(archive.read("adapter_config.json"))["peft_type"] == "LORA"
    example = load_examples(str(folder / "runs/notebook_data/test_questions.jsonl"))[0]
    first = json.loads((folder / "runs/evaluation.json").read_text(encoding="utf-8"))["rows"]["adapter"][0]
    assert first["id"] == example["id"]
    assert said(cells["ask"]).strip().endswith(f"{example['question']}\n{first['text']}")
    assert shown(cells["ask"]).size == example["images"][0].size


# --- what cannot run here: the same lines, with a stand-in for what is far away ----------------------------------


def shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_the_charts_are_prepared_from_a_part_of_their_dataset(tmp_path, monkeypatch):
    part = Path(build_refocus(tmp_path / "hub", num_plain=300)[0]) / "data/train-00000-of-00003.parquet"
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names, **options: asked.append(names) or str(part))
    cell = {"EMBEDDED": False, "DATA": tmp_path / "data", "TEST_QUESTIONS": 64, "run": shell}
    exec(CODE["data"], cell | {"Path": Path})
    assert asked == [("ReFocus/ReFocus_Data", "data/train-00002-of-00003.parquet")]
    train, test = (load_examples(str(tmp_path / f"data/{name}_questions.jsonl")) for name in ("train", "test"))
    pictures = [{part.peek(index)["images"][0] for index in range(len(part))} for part in (train, test)]
    assert len(test) == 64 and 0 < len(train) < 39  # 103 rows, of which the later ones show one and the same picture
    assert not pictures[0] & pictures[1]


def test_an_adapter_goes_to_the_hub_and_its_token_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/notebook/adapter").mkdir(parents=True)
    (tmp_path / "runs/notebook/adapter/adapter_config.json").write_text("{}")
    calls = []
    monkeypatch.setattr("getpass.getpass", lambda prompt: "hf_secret")
    for name in ("create_repo", "get_token", "login", "upload_folder"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *a, name=name, **k: calls.append((name, a, k)))
    filled_in = CODE["keep"].replace('HUB_NAME = ""', 'HUB_NAME = "me/charts"')
    assert filled_in != CODE["keep"]
    exec(filled_in, {"RUN": Path("runs/notebook"), "shutil": shutil, "os": os})
    assert [name for name, _, _ in calls] == ["get_token", "login", "create_repo", "upload_folder"]
    assert calls[1][2] == {"token": "hf_secret"} and calls[2][2]["private"] is True
    assert calls[3][2]["repo_id"] == "me/charts" and calls[3][2]["folder_path"] == Path("runs/notebook/adapter")
    assert "hf_secret" not in capsys.readouterr().out


def settings_with(**fields) -> dict:
    """The names that the first cell defines, with other values in its fields."""
    source = CODE["settings"]
    for name, value in fields.items():
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.MULTILINE)
        assert count >= 1
    names: dict = {}
    exec(source, names)
    return names


def test_without_a_copy_the_repository_is_fetched(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train_rl.py", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(f"git {command}", shell=True, check=True, cwd=source)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "content").mkdir()
    for repository, error in {"https://github.com/OWNER/sayo": "REPOSITORY", str(source): "there is no GPU"}.items():
        monkeypatch.chdir(tmp_path / "content")
        names, commands = settings_with(REPOSITORY=repository), []

        def run(command, commands=commands):
            commands.append(command)
            if command.startswith("git"):
                subprocess.run(command, shell=True, check=True)

        with pytest.raises((ValueError, RuntimeError), match=error):
            exec(CODE["install"], names | {"run": run, "EMBEDDED": False})
    assert commands == [f"git clone --depth 1 {source} sayo", "python -m pip install -q -r requirements.txt"]
    assert Path.cwd() == tmp_path / "content/sayo" and Path("train_rl.py").is_file()


def test_the_commands_for_a_t4_are_understood(tmp_path, monkeypatch):
    """It has 16 GB and no bfloat16. Nothing is run: the scripts read the flags that the cells give them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    Path("runs").mkdir()
    for name in ("sheet", "look"):
        shutil.copy(ROOT / "docs/check.png", f"runs/{name}.png")
    commands: list[str] = []
    data = {"TRAIN": Path("runs/train.jsonl"), "TEST": Path("runs/test.jsonl")}
    names = settings_with(EMBEDDED=False, STEPS=7) | data | {"run": commands.append}
    for name in ("sheet", "plan", "train", "look", "evaluate"):
        exec(CODE[name], names)
    scripts = {"train_rl.py": Config, "visualize.py": VisualizeConfig, "evaluate.py": EvaluateConfig}
    read = []
    for command in commands:
        python, script, *flags = command.replace("-m data.check ", "data.check --data ").split()
        read.append(read_config(scripts.get(script, CheckConfig), flags))
        assert (python, read[-1].model) == ("python", "Qwen/Qwen3-VL-2B-Instruct")
        assert (read[-1].load_in_4bit, read[-1].dtype, read[-1].max_pixels) == (True, "float16", read[0].max_pixels)
    check, plan, train, look, evaluate = read
    assert (plan.plan, train.plan, train.max_steps, train.data) == (True, False, 7, check.data)
    assert (
        look.data == evaluate.data == "runs/test.jsonl" and look.adapter == evaluate.adapter == "runs/notebook/adapter"
    )
    assert evaluate.max_new_tokens == train.max_new_tokens


def test_with_drive_the_run_is_written_there(monkeypatch):
    mounted, colab = [], ModuleType("google.colab")
    colab.drive = ModuleType("google.colab.drive")
    colab.drive.mount = mounted.append
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(ROOT)
    names = settings_with(KEEP_ON_DRIVE=True, EMBEDDED=True)
    exec(CODE["install"], names | {"run": lambda command: None})
    assert mounted == ["/content/drive"] and names["RUN"] == Path("/content/drive/MyDrive/sayo_run")


# --- the file ----------------------------------------------------------------------------------------------------


def test_the_file_is_valid_and_reads_as_a_diff():
    """As nbformat.write writes it, without outputs, so that a change of a line is a change of a line."""
    nbformat.validate(NOTEBOOK)
    assert FILE.read_text(encoding="utf-8") == nbformat.writes(NOTEBOOK) + "\n"
    assert len({cell.id for cell in NOTEBOOK.cells}) == len(NOTEBOOK.cells)
    for cell in NOTEBOOK.cells:
        assert re.fullmatch("[a-z-]+", cell.id) and not cell.metadata and cell.source == cell.source.strip()
        if cell.cell_type == "code":
            assert cell.execution_count is None and cell.outputs == []


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) >= 4
    for link in links:
        known = re.match(r"https://(colab\.research\.google\.com|arxiv\.org|huggingface\.co)/", link)
        assert known or (ROOT / link).is_file(), link
    named = re.findall(r"`((?:\w+/)*\w+\.(?:md|py|txt|yaml))`", TEXT)
    assert {"README.md", "tests/test_notebook.py"} <= set(named)
    assert all((ROOT / name).is_file() for name in named)


def test_paths_are_those_of_colab_or_relative():
    found = re.findall(r"(?<![\w.:/<}>*])/[A-Za-z][\w./-]*", "\n".join(CODE.values()))
    assert found and all(path.startswith("/content/") for path in found), found


def test_only_the_requirements_are_installed():
    """And they leave alone what Colab listed in June 2026: a newer PyTorch is gigabytes, and may not fit."""
    everything = "\n".join([*CODE.values(), TEXT])
    assert re.findall(r"pip3? install[^\n\"]*", everything) == ["pip install -q -r requirements.txt"]
    there = {"torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.0.2", "pillow": "11.3.0", "matplotlib": "3.10.0"}
    wanted = dict(re.findall(r"^(\w+)>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    for name, version in there.items():
        assert Version(version) >= Version(wanted[name]), name


def test_form_fields_have_the_type_they_say():
    types = {"EMBEDDED": bool, "STEPS": int, "TEST_QUESTIONS": int, "IN_4_BIT": bool, "KEEP_ON_DRIVE": bool}
    types |= {"REPOSITORY": str, "HUB_NAME": str}
    fields = re.findall(r"^(\w+) = (.+?)  # @param \{type:\"(\w+)\"\}$", "\n".join(CODE.values()), re.MULTILINE)
    assert {name for name, _, _ in fields} == set(types)
    for name, value, kind in fields:
        assert type(ast.literal_eval(value)) is types[name], name
        assert kind == {bool: "boolean", int: "integer", str: "string"}[types[name]]
