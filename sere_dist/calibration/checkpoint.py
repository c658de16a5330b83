"""Parts of a model's checkpoint, in float32, without the rest: one decoder layer, or only its experts.

The names and layouts in a checkpoint differ from those of the modules that run it (experts one by one or stacked, older
names). transformers knows how to convert each; this module applies its conversions to the tensors of the wanted part
alone, which are dequantised one by one as they are read.
"""

import json
import platform
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError, StrictDataclassError
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sere_dist.calibration.dequantise import Parts, Quantisation, from_mxfp4, unpack_scales, weight_parts

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
MODELOPT_FILE = "hf_quant_config.json"
QUANTISED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8")  # by safetensors' names
STACKED = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])  # how experts become one parameter
READERS = 4  # threads, each with one tensor at a time


class _Sizes(BaseModel):
    total_size: float = 0


class _Index(BaseModel):
    weight_map: dict[str, str]
    metadata: _Sizes = _Sizes()


Pieces = dict[str | None, list[str]]  # tensors of a checkpoint, by the pattern of transformers' that they match
Read = Callable[[str], torch.Tensor]


class Checkpoint:
    """A checkpoint in a folder, or on the Hugging Face Hub, of which only the files that are needed are fetched.

    Attributes:
        name: the folder or the Hub's model id.
        place: the same for processes that run elsewhere: the folder's absolute path.
        revision: the Hub's commit; None for a folder.
        config: the model's configuration, without what it says of quantisation.
    """

    def __init__(self, name: str, revision: str | None = None):
        """Reads the configuration.

        Raises:
            ValueError: there is no such model, transformers does not know its architecture, or it is quantised in a way
                that can't be undone here; the message says what to use instead.
            OSError: a file that may say how it is quantised can't be fetched.
        """
        self.name, self._is_folder = name, Path(name).is_dir()
        self.place = str(Path(name).resolve()) if self._is_folder else name
        if Path(name).is_absolute() and not self._is_folder:
            raise ValueError(
                f"--model {name}: the machine {platform.node()} has no such folder; put the model on storage that all "
                "nodes share"
            )
        if self._is_folder and revision is not None:
            raise ValueError(f"--revision is for models on the Hub: leave it out, --model {name} is a folder")
        self.revision = revision
        try:
            if not self._is_folder:  # from here on all of one commit, whatever is pushed meanwhile
                self.revision = self.path("config.json").parent.name
            self.config = AutoConfig.from_pretrained(name, revision=self.revision, trust_remote_code=False)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise ValueError(
                f"--model {name}{'' if self._is_folder else ' (no such folder here)'} must be a folder, or a model on "
                f"the Hub, with a config.json that transformers {transformers.__version__} itself can read: {error}"
            ) from error
        self._dtype = getattr(self.config, "dtype", None) or torch.float32
        self._quantisation = None if (content := self._quantisation_config()) is None else Quantisation(name, content)

    def _quantisation_config(self) -> dict | None:
        """Returns what the configuration says of quantisation, and takes it out; None for a model as it was trained."""
        found = None
        for config in (self.config, self.config.get_text_config()):
            if quantisation := getattr(config, "quantization_config", None):
                found = quantisation
                del config.quantization_config
        if found is not None:
            return found
        try:
            return json.loads(self.path(MODELOPT_FILE).read_bytes())  # ModelOpt before 0.31 had it in a file of its own
        except FileNotFoundError:
            return None

    @cached_property
    def files(self) -> dict[str, str]:
        """The file of every tensor, by the tensor's name in the checkpoint.

        Raises:
            ValueError: the checkpoint has no safetensors files, or its index can't be read.
        """
        if self._index:
            return self._index.weight_map
        try:
            single = self.path(SINGLE_FILE)
        except FileNotFoundError as error:
            raise ValueError(
                f"--model {self.name} has neither {INDEX_FILE} nor {SINGLE_FILE}; save it as safetensors "
                f"(transformers: save_pretrained): {error}"
            ) from error
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)

    @cached_property
    def _index(self) -> _Index | None:
        try:
            return _Index.model_validate_json(self.path(INDEX_FILE).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in error.errors())
            raise ValueError(f"--model {self.name}: {INDEX_FILE} is damaged, fetch it again: {what}") from error

    def path(self, file: str) -> Path:
        """Returns the local path of one file, fetched if the model is on the Hub.

        Raises:
            FileNotFoundError: there is no such file, or it is not in the Hub's cache here and the Hub can't be reached.
            OSError: it can't be fetched.
        """
        if self._is_folder:
            if not (path := Path(self.name) / file).is_file():
                raise FileNotFoundError(f"--model {self.name}: the folder has no {file}")
            return path
        what = f"--model {self.name}: {file} of revision {self.revision}"
        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(f"{what} is not on the Hub") from error
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(f"{what} is not in this machine's cache of the Hub: {error}") from error
        except HTTPError as error:
            raise OSError(f"{what} can't be fetched from the Hub: {error!r}") from error

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What changes when the model changes: the Hub's commit, or each local file's size and time."""
        if not self._is_folder:
            return {"commit": str(self.revision)}
        files = sorted({"config.json", *self.files.values()})
        stats = {file: self.path(file).stat() for file in files}
        return {file: f"{stat.st_size} bytes, {stat.st_mtime_ns}" for file, stat in stats.items()}

    def stored_bytes(self, parameters: int) -> float:
        """Returns what one of the model's parameters takes in the checkpoint, in bytes, without fetching weights."""
        if self._index and self._index.metadata.total_size:
            return self._index.metadata.total_size / parameters
        if (single := Path(self.name) / SINGLE_FILE).is_file():
            return single.stat().st_size / parameters
        return self._dtype.itemsize

    def empty_model(self) -> PreTrainedModel:
        """Returns the model in evaluation mode, its parameters on the meta device; buffers that no file holds are real.

        Raises:
            ValueError: transformers has no such causal language model.
        """
        try:
            # Eager experts are float32 on every device, which grouped kernels are not, and no slower for one at a time.
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
                ).eval()
        except ValueError as error:
            raise ValueError(
                f"--model {self.name}: transformers {transformers.__version__} has no causal language model for "
                f"{self.config.model_type}"
            ) from error
        for name, buffer in model.named_non_persistent_buffers():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, torch.empty_like(buffer, device="cpu"))
        model.initialize_weights()  # as from_pretrained does; on the meta device this takes nothing
        return model

    @torch.no_grad()
    def load(self, model: PreTrainedModel, wanted: Callable[[str], bool], device: str) -> None:
        """Gives `model`, made by `empty_model`, those of its parameters whose names are wanted, in float32.

        Beside these no more than a few of the tensors that they are made of are in memory at a time.

        Raises:
            ValueError: a parameter is not in the checkpoint, has another shape there, or a file can't be read.
            OSError: a file is missing, or can't be fetched.
        """
        empty = {name: tensor for name, tensor in model.state_dict().items() if wanted(name)}
        pieces_of, converter_of = self._pieces(model)
        pieces_of = {name: pieces for name, pieces in pieces_of.items() if name in empty}
        tensors = [tensor for pieces in pieces_of.values() for each in pieces.values() for tensor in each]
        files = sorted({self.files[part] for tensor in tensors for part in self._parts[tensor].values()})
        loaded: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            opened = {file: stack.enter_context(_opened(self.path(file))) for file in files}
            read = partial(self._read, opened, device)
            for name, pieces in pieces_of.items():
                converter = converter_of.get(next(iter(pieces)))
                if converter is None:
                    values = {name: read(pieces[None][0])}
                elif [(type(step), getattr(step, "dim", None)) for step in converter.operations] in STACKED:
                    values = {name: torch.empty_like(empty[name], device=device)}
                    self._fill(name, values[name], pieces, converter.source_patterns, read)
                else:
                    values = _converted(name, pieces, converter, model, read)
                loaded |= {target: value.to(device, empty[name].dtype) for target, value in values.items()}

        for name, tensor in empty.items():
            if name not in loaded:
                raise ValueError(
                    f"--model {self.name}: the checkpoint has nothing for {name} (shape {tuple(tensor.shape)}); looked "
                    f"for it with the conversions of transformers {transformers.__version__} for "
                    f"{model.config.model_type}"
                )
            self._check_shape(name, loaded[name], tensor)
            module, _, attribute = name.rpartition(".")
            is_buffer = attribute in dict(model.get_submodule(module).named_buffers(recurse=False))
            value = loaded[name] if is_buffer else torch.nn.Parameter(loaded[name], requires_grad=False)
            setattr(model.get_submodule(module), attribute, value)

    def _pieces(self, model: PreTrainedModel) -> tuple[dict[str, Pieces], dict[str, WeightConverter]]:
        """Returns what each parameter is made of, by its name, and how, by the pattern that the pieces match."""
        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        pieces_of: dict[str, Pieces] = defaultdict(lambda: defaultdict(list))
        for tensor in sorted(self._parts, key=dot_natural_key):  # in transformers' order: experts by their numbers
            name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
            if name not in state and tensor in state:
                name, pattern = tensor, None
            pieces_of[name][pattern].append(tensor)
        for tied in model.all_tied_weights_keys.items():  # of two, a checkpoint may hold the one or the other
            for name, other in (tied, reversed(tied)):
                if name not in pieces_of and other in pieces_of:
                    pieces_of[name] = pieces_of[other]
        return pieces_of, {pattern: entry for entry in converters for pattern in entry.source_patterns}

    def _fill(self, name: str, stacked: torch.Tensor, pieces: Pieces, patterns: list[str], read: Read) -> None:
        """Reads into `stacked` [E, ...] E tensors for each pattern; those of several patterns lie one below the other.

        transformers' own operations for it would have everything in memory twice.
        """
        if any(len(pieces.get(pattern, ())) != len(stacked) for pattern in patterns):
            counts = ", ".join(f"{len(pieces.get(pattern, ()))} of {pattern}" for pattern in patterns)
            raise ValueError(f"--model {self.name}: {name} takes {len(stacked)} of each; the checkpoint has {counts}")
        parts = zip(patterns, stacked.chunk(len(patterns), dim=1), strict=True)
        places = {tensor: place for pattern, part in parts for tensor, place in zip(pieces[pattern], part, strict=True)}

        def fill(tensor: str) -> None:
            value = read(tensor)
            self._check_shape(tensor, value, places[tensor])
            places[tensor].copy_(value)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, places))

    def _check_shape(self, name: str, value: torch.Tensor, expected: torch.Tensor) -> None:
        if value.shape != expected.shape:
            raise ValueError(
                f"--model {self.name}: {name} is {tuple(value.shape)} in the checkpoint, but its configuration calls "
                f"for {tuple(expected.shape)}"
            )

    @cached_property
    def _parts(self) -> dict[str, dict[str, str]]:
        """The names of what every tensor is made of: its values, and scales and the like if it is quantised."""
        if self._quantisation is None:
            return {key: {"values": key} for key in self.files}
        return weight_parts(self.files)

    def _read(self, opened: dict[str, Any], device: str, tensor: str) -> torch.Tensor:
        """Returns a tensor from the opened files; one that was quantised in float32."""
        names = self._parts[tensor]
        try:
            slices = {part: opened[self.files[name]].get_slice(name) for part, name in names.items()}
        except SafetensorError as error:
            raise ValueError(
                f"--model {self.name}: not in {self.files[names['values']]}, as {INDEX_FILE} says: {error}"
            ) from error
        values = slices["values"]
        if "scales" not in slices:
            if values.get_dtype() in QUANTISED_DTYPES or names["values"] != tensor:
                raise ValueError(
                    f"--model {self.name}: {tensor} is {values.get_dtype()} and has no scale: calibrate the checkpoint "
                    "that this one was made from"
                )
            return values[...]
        assert self._quantisation is not None  # only a quantised checkpoint has scales
        if len(values.get_shape()) == 4:
            return from_mxfp4(values, unpack_scales(slices["scales"][...]).to(device))
        try:
            return self._quantisation.undo(Parts({part: each[...].to(device) for part, each in slices.items()}))
        except ValueError as error:
            raise ValueError(f"--model {self.name}: {tensor}: {error}") from error


def _converted(
    name: str, pieces: Pieces, converter: WeightConverter, model: PreTrainedModel, read: Read
) -> dict[str, torch.Tensor]:
    """Returns the parameters, of which `name` is the first, that transformers makes of these pieces."""
    converter = deepcopy(converter)
    for pattern, tensors in pieces.items():
        for tensor in tensors:
            assert pattern is not None  # there is no converter for a tensor that matches none
            # Its signature has futures of tensors; it takes tensors, too.
            converter.add_tensor(name, tensor, pattern, read(tensor))  # ty: ignore[invalid-argument-type]
    values = converter.convert(name, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not whole, fetch it again: {error}") from error
