"""What trainings and commands import, imported once for all processes forked from here."""

import accelerate  # noqa: F401
import pandas  # noqa: F401
import pyarrow.compute  # noqa: F401
import pydantic.dataclasses  # noqa: F401
import safetensors.torch  # noqa: F401
import train_autoencoder  # noqa: F401
import train_clip  # noqa: F401
import train_latent  # noqa: F401
from accelerate import Accelerator  # noqa: F401
from transformers.models.clip import CLIPModel  # noqa: F401

import latentdiff.cli.convert
import latentdiff.cli.doctor
import latentdiff.cli.inspect
import latentdiff.data.latents
import latentdiff.formats.folder
import latentdiff.models.autoencoder
import latentdiff.models.clip_text
import latentdiff.pipelines.generate
import latentdiff.train.run  # noqa: F401
