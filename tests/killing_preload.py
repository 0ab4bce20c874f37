"""Everything that a training imports, imported once for all processes forked from here."""

import accelerate  # noqa: F401
import safetensors.torch  # noqa: F401
import train_latent  # noqa: F401

import latentdiff.data.latents
import latentdiff.formats.diffusers_folder
import latentdiff.models.autoencoder
import latentdiff.models.text_encoder
import latentdiff.trainer.latent_run  # noqa: F401
