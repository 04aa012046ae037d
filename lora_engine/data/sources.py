"""STUB"""
import os
from importlib import import_module
from typing import NamedTuple


class Part(NamedTuple):
    format: str
    path: str
    image_root: str
class Sources(NamedTuple):
    parts: list
    missing: list
    notices: list
def find_parts(paths, options):
    paths=[paths] if isinstance(paths,str) else paths
    return Sources([Part("json_list", os.path.realpath(p), os.path.dirname(os.path.realpath(p))) for p in paths], [], [])
def describe(parts): return "JSON list"
def format_module(name): return import_module(f"lora_engine.data.formats.{name}")
def split_of(path): return ""
def normal_split(n): return n
def is_source(p): return p.endswith(".json")
