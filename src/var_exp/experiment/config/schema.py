"""What the programs read of a configuration: every key, its type, its range and its meaning.

`TrainConfig` is `conf/train.yaml`, `SampleConfig` is `conf/sample.yaml`; a field without a doc of
its own is a group whose fields have theirs. The schema holds no defaults, which are in `conf/`,
and nothing of parts with a `_target_`: what those take, their constructors say.

`validate.py` reads it, with pydantic. As a structured config of OmegaConf it would not be strict
("3" becomes 3), would have no ranges and no `list[int | list[int]]`, and a wrong value would be
refused in three or four lines.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt, MinLen
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints

from var_exp.configurable import Seed, VocabSize, Zero
from var_exp.sampling.generate import CfgScale, Temperature, TopP

Part = Callable[..., Any]  # {_target_: ...}: a class or function with its arguments
Word = str | int | float  # a folder may be called 2024
BatchSize = Annotated[int, Ge(1), Le(10**6)]
ScoredImages = VocabSize  # distances and covariances are of at least two
Band = Annotated[list[float], MinLen(2)]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|(cuda|mps|xpu)(:\d+)?)$")]


def doc(text: str) -> Any:
    """A field with the sentence that the documentation has for it."""
    return field(metadata={"doc": text})


@dataclass
class Scales:
    """The schedule of token maps."""

    patch_nums: list[int | list[int]] = doc("Side of each token map, or its [height, width].")


@dataclass
class Sampling:
    """How samples are drawn."""

    cfg_scale: CfgScale = doc("Guidance weight at the last scale, rising from 0; 0 is none.")
    top_k: NonNegativeInt = doc("Keep so many of the likeliest codes; 0 keeps all.")
    top_p: TopP = doc("Keep the likeliest codes up to this mass; 0 keeps all.")
    temperature: Temperature = doc("Divide the logits by this.")


@dataclass
class Scores:
    """What scores depend on; the defaults are torch-fidelity's."""

    num_splits: PositiveInt = doc("Random parts that the Inception Score is averaged over.")
    kid_subsets: PositiveInt = doc("Random subsets that KID is averaged over.")
    kid_subset_size: PositiveInt = doc("Images in each subset, or as many as there are.")
    num_neighbours: PositiveInt = doc("Neighbours of precision and recall.")
    seed: Annotated[int, Ge(0), Lt(2**32)] = doc("Of splits and subsets.")


@dataclass(kw_only=True)
class Evaluation:
    """How reconstructions and samples are scored."""

    network: Part = doc("Network whose features images are compared in.")
    num_samples: ScoredImages = doc("Samples that the final scores are measured on.")
    num_samples_per_scale: Zero | ScoredImages = doc(
        "Samples of them that are scored after each scale, too; 0 scores none."
    )
    num_samples_val: ScoredImages = doc("Samples that are scored during training.")
    num_reconstructions_val: ScoredImages | None = doc(
        "Reconstructions that are scored during training; null takes all validation images."
    )
    batch_size: BatchSize = doc("Samples that are drawn at once.")
    both_weights: bool = doc("Score raw and averaged weights in training, where both are kept.")
    every_n_batches: PositiveInt | None = doc("Batches between scores; null: at each validation.")
    every_n_epochs: PositiveInt | None = doc("Epochs between scores, in place of every_n_batches.")
    weights: str | None = doc("File of the network's weights; null fetches them where needed.")
    reference: str | None = doc("An .npz to compare with; null takes images of the data set.")
    num_reference: ScoredImages | None = doc("Training images to compare with, at most.")
    cache: str | None = doc("Folder that keeps statistics of reference images.")
    scores: Scores
    sampling: Sampling
    expected: dict[str, dict[str, Band] | None] = doc(
        "Bands [low, high] of final scores by model: {d16: {fid_inception: [3.3, 3.6]}}."
    )


@dataclass
class Stage:
    """How long a stage trains, in global batches; the other keys are arguments of its module."""

    batch_size: BatchSize = doc("Images of a batch, over all devices.")
    num_batches: PositiveInt | None = doc("Length of the stage; null where epochs is given.")
    epochs: PositiveFloat | None = doc("Length of the stage in epochs, in place of num_batches.")
    val_every: PositiveInt = doc("Batches between validations.")
    save_every: PositiveInt | None = doc("Batches between checkpoints besides validations'.")


@dataclass
class Tokens:
    """The images in the tokenizer's codes, which stage two trains on."""

    dir: Word | None = doc("Folder of the codes; null is tokens/ in the run folder.")
    views: PositiveInt = doc("Views of each training image; epoch e trains on view e % views.")
    batch_size: BatchSize = doc("Images that a device encodes at once.")


@dataclass(kw_only=True)
class TrainConfig:
    """What `train.py` reads."""

    name: Word = doc("Name of the run, in its folder and its report.")
    seed: Seed = doc("Of weights, the order of images, augmentation and samples.")
    stages: list[Literal["tokenizer", "tokens", "var"]] = doc("Stages to run, in this order.")
    tokenizer_ckpt: Word | None = doc("Trained tokenizer for runs without the tokenizer stage.")
    init_from: Word | None = doc("Weights that the network of the stage starts from.")
    resume: Word = doc("auto resumes where the run folder has checkpoints; never; or a path.")
    check: bool | Literal["all"] = doc("Report problems and cost and train nothing.")
    expected: dict[str, Band] = doc("Bands [low, high] of final metrics: {var/loss: [6, 6.1]}.")
    objective: str | None = doc("Metric that train() returns, for searches: var/loss.")
    runs_dir: Word = doc("Folder of all runs; `latest` in it links to the newest.")
    run_dir: Word = doc("Folder of this run.")
    num_threads: PositiveInt | None = doc("CPU threads of each process; null is one for each core.")
    data: Part = doc("The images.")
    datamodule: Part = doc("The LightningDataModule that loads them.")
    tokenizer: Part = doc("Network of stage one.")
    transformer: Part = doc("Network of stage two.")
    adversary: Part | None = doc("Discriminator of the tokenizer and its losses; null is none.")
    trainer: Part = doc("Lightning's Trainer.")
    callbacks: dict[str, dict[str, Part]] = doc("Lightning callbacks of each stage, by any name.")
    logger: dict[str, Part] = doc("Lightning loggers, by any name.")
    scales: Scales
    model: dict[str, Stage] = doc("The stages, by name.")
    tokens: Tokens
    sampling: Sampling
    evaluation: Evaluation


@dataclass(kw_only=True)
class SampleConfig(Sampling):
    """What `sample.py` reads."""

    ckpt: Word | None = doc("Run folder, checkpoint or portable folder of the networks.")
    official: str | None = doc("Published model, in place of ckpt: var_d16.")
    official_dir: Word = doc("Folder of the published files.")
    weights: Literal["averaged", "raw"] | None = doc("Weights to use where a run kept both.")
    classes: Any = doc("all, a list of classes, or null for samples without a class.")
    num_samples: NonNegativeInt | None = doc("Samples in all; null is 16, or the evaluation's.")
    seed: Seed = doc("Sample i depends on the seed and i alone.")
    batch_size: BatchSize = doc("Samples that are drawn at once; no sample depends on it.")
    precision: str = doc("32-true or bf16-mixed.")
    compile: bool | Literal["graphs"] = doc("Compile the networks; graphs adds CUDA graphs.")
    device: Device = doc("auto, cpu, cuda or mps.")
    devices: PositiveInt = doc("Processes on this machine, each with its device.")
    num_nodes: PositiveInt = doc("Machines with as many processes each.")
    out_dir: Word = doc("Folder of the samples.")
    png: bool = doc("Write a file for each sample.")
    npz: bool = doc("Write one file of all samples.")
    evaluate: bool = doc("Score the samples, into metrics.json.")
    data: dict[str, Any] = doc("Changes to the data of the run that samples are compared with.")
    runs_dir: Word = doc("Folder whose references/ holds statistics of real images.")
    export: str | None = doc("Folder for the networks that VARPipeline.from_pretrained reads.")
    export_official: str | None = doc("Folder for the networks in the authors' format.")
    evaluation: Evaluation
