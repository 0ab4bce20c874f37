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

import latentdiff.commands.convert
import latentdiff.commands.inspect
import latentdiff.data.latents
import latentdiff.doctor.command
import latentdiff.formats.diffusers_folder
import latentdiff.models.autoencoder
import latentdiff.models.text_encoder
import latentdiff.pipelines.text_to_image
import latentdiff.trainer.latent_run  # noqa: F401
