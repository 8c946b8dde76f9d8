"""Adds READMEs and notebooks to the documentation, and renders formulas and the program's help."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "graphcaps/**/README.md", "benchmarks/*.md", "notebooks/*.gif")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Register a formatter for fenced blocks of the language `math`."""
    fence = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages and notebooks at their own paths, and the files they link to."""
    names = {path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)}
    for page in sorted(name for name in names if name.endswith(".md")):
        folder = Path(page).parent
        linked = (folder / target for target in LINK.findall((ROOT / page).read_text()))
        names |= {os.path.normpath(file) for file in linked if (ROOT / file).is_file()}
    for name in sorted(names):
        if name.endswith(".ipynb"):
            for made, content in _notebook(name).items():
                files.append(File.generated(config, made, content=content))
        else:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def _notebook(name: str) -> dict[str, str | bytes]:
    """Convert a notebook to a page with the images of its outputs, without executing it."""
    folder, stem = Path(name).parent, Path(name).stem
    resources = {"output_files_dir": f"{stem}_files"}
    text, made = MarkdownExporter().from_filename(str(ROOT / name), resources=resources)
    outputs = {f"{folder}/{file}": content for file, content in made["outputs"].items()}
    return {f"{folder}/{stem}.md": text} | outputs


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to notebooks to their pages, and replace comments that name a help command."""
    markdown = re.sub(r"(\]\([^)\s]*)\.ipynb\b", r"\1.md", markdown)
    return re.sub(r"<!-- (graphcaps .*?) -->", lambda found: _help(found[1]), markdown)


def _help(command: str) -> str:
    shown = subprocess.check_output(
        [sys.executable, "-m", *command.split()],
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80", "PYTHONUTF8": "1"},
    )
    return f"```text\n$ {command}\n{shown}```"


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render inline formulas, which arithmatex marks."""
    marked = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    return marked.sub(lambda found: _mathml(html.unescape(found[1]), "inline"), content)


def _formula(source: str, language: str, css_class: str, *_: object, **__: object) -> str:
    """Render a block of LaTeX, with a line for each line of `aligned`."""
    lines = re.sub(r"\\(begin|end)\{aligned\}", "", source).split("\\\\\n")
    rows = (f"<div>{_mathml(line.strip().removeprefix('&'), 'block')}</div>" for line in lines)
    return f'<div class="{html.escape(css_class)}">{"".join(rows)}</div>'


def _mathml(source: str, display: str) -> str:
    """Convert LaTeX to MathML, which browsers render without scripts."""
    drawn = latex2mathml.converter.convert(source, display=display)
    drawn = drawn.replace("<mi>ln</mi>", '<mi>ln</mi><mspace width="0.17em"/>')
    return drawn.replace('display="block"', 'displaystyle="true"', 1)
