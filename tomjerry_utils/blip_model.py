"""The BLIP of stage 03 (φ on the poster): one vision tower, three tasks, and their similarity.

As in Li et al. 2022 (arXiv 2201.12086) one tower carries a decoder that writes captions, a
contrastive pair of projections (ITC) and a matching head (ITM). The first lives in
`BlipForConditionalGeneration`, the other two in `BlipForImageTextRetrieval`; here both hold the
*same* tower, so that what captioning learns also shapes the similarity of stage 05.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.utils import logging as transformers_logging

from tomjerry_utils import UserError
from tomjerry_utils.blip_attention import fuse_attention
from tomjerry_utils.captions import to_target as to_natural
from tomjerry_utils.images import to_tensor
from tomjerry_utils.runs import model_source

VARIANTS = ("vision", "contrastive", "matching", "likelihood")
LORA_TARGETS = ("query", "key", "value", "qkv", "projection")  # attention, text and vision
IGNORED = -100  # the label that cross-entropy skips
# A captioning checkpoint has no text encoder: where its publisher has one, it is named here.
RETRIEVAL_OF = {"Salesforce/blip-image-captioning-base": "Salesforce/blip-itm-base-coco"}

Images = np.ndarray | torch.Tensor

transformers_logging.disable_progress_bar()  # a bar for each tiny file that is read floods the log


@dataclass(eq=False)
class Blip:
    """BLIP with its three tasks. Images are uint8 (B, H, W, 3) or float (B, 3, H, W) in [-1, 1]."""

    captioner: BlipForConditionalGeneration
    retrieval: BlipForImageTextRetrieval
    tokenizer: Any
    processor: BlipImageProcessorPil
    max_length: int = 40

    @property
    def device(self) -> torch.device:
        return self.captioner.device

    @property
    def image_size(self) -> int:
        return self.captioner.config.vision_config.image_size

    def parts(self) -> dict[str, nn.Module]:
        """The modules that training sees; the shared vision tower stands there once."""
        heads = ("text_encoder", "vision_proj", "text_proj", "itm_head")
        return {
            "vision_model": self.captioner.vision_model,
            "text_decoder": self.captioner.text_decoder,
            **{name: getattr(self.retrieval, name) for name in heads},
        }

    def pixels(self, images: Images) -> torch.Tensor:
        """What the vision tower reads: resized and renormalised, differentiable for a tensor."""
        tensor = images if torch.is_tensor(images) else to_tensor(images)
        tensor, size = tensor.to(self.device), (self.image_size, self.image_size)
        if tensor.shape[-2:] != size:
            tensor = F.interpolate(tensor, size=size, mode="bicubic", antialias=True)
        mean, std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return ((tensor + 1) / 2 - mean) / std

    def tokens(
        self, texts: Sequence[str], *, decode: bool = False, length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (B, L); with `decode`, from the decoder's start token."""
        encoded = self.tokenizer(
            list(texts),
            padding="max_length" if length else True,
            truncation=True,
            max_length=length or self.max_length,
            return_tensors="pt",
        ).to(self.device)
        if decode:
            # generate() starts from [DEC], not [CLS]: train on what it will see.
            encoded.input_ids[:, 0] = self.captioner.config.text_config.bos_token_id
        return encoded.input_ids, encoded.attention_mask

    def vision_features(self, images: Images) -> torch.Tensor:
        """Tokens (B, L, D) of the vision tower: the class token, then one for each patch."""
        return self.captioner.vision_model(self.pixels(images)).last_hidden_state

    def image_embeds(self, images: Images) -> torch.Tensor:
        """Contrastive embeddings (B, P) of unit length; differentiable in a tensor's pixels."""
        return self.project(self.vision_features(images))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Vision features (B, L, D) → contrastive embeddings (B, P) of unit length."""
        return F.normalize(self.retrieval.vision_proj(features[:, 0]), dim=-1)

    def text_tokens(
        self, texts: Sequence[str], *, length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features (B, L, D) without an image, and their mask (B, L), 1 = a word.

        This is what the denoisers of stages 04 and 05 attend to. With `length`, L is that.
        """
        ids, mask = self.tokens(texts, length=length)
        return self.retrieval.text_encoder(ids, attention_mask=mask).last_hidden_state, mask

    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """Contrastive embeddings (B, P) of unit length, one a text."""
        features, _ = self.text_tokens(texts)
        return F.normalize(self.retrieval.text_proj(features[:, 0]), dim=-1)

    def itm_logits(
        self, images: Images | None, texts: Sequence[str], *, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Matching logits (B, 2) of image i with text i: column 1 is "they match".

        `features` are vision features already at hand, instead of images.
        """
        features = self._features(images, features)
        ids, mask = self.tokens(texts)
        hidden = self.retrieval.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=features
        ).last_hidden_state
        return self.retrieval.itm_head(hidden[:, 0])

    def caption_loss(
        self,
        images: Images | None,
        texts: Sequence[str],
        *,
        features: torch.Tensor | None = None,
        reduction: str = "mean",
        begun: bool = False,
    ) -> torch.Tensor:
        """Mean −log p(word | words before, image) over all words, pads left out.

        This is what is trained on, with the label smoothing that a checkpoint may ask for. With
        `reduction="none"`, for measuring: one value (B,) for each caption, the mean over its own
        words, without smoothing. With `begun`, the texts are how captions begin: that they end
        there is not taught.
        """
        features = self._features(images, features)
        ids, mask = self.tokens(texts, decode=True)
        if begun:
            mask = mask.masked_fill(ids == self.tokenizer.sep_token_id, 0)
        labels = mask_labels(ids, mask)[:, 1:]
        # The last token writes nothing: position i predicts the word at i + 1.
        decoder = self.captioner.text_decoder
        logits = decoder(
            ids[:, :-1], attention_mask=mask[:, :-1], encoder_hidden_states=features
        ).logits.mT
        if reduction == "mean":
            return F.cross_entropy(logits, labels, label_smoothing=decoder.label_smoothing)
        each = F.cross_entropy(logits, labels, reduction="none")
        return each.sum(1) / (labels != IGNORED).sum(1)

    def generate(self, images: Images, *, batch_size: int = 64, num_beams: int = 1) -> list[str]:
        """Write one caption for each image: greedy, or by beam search."""
        texts: list[str] = []
        for start in range(0, len(images), batch_size):
            ids = self.captioner.generate(
                self.pixels(images[start : start + batch_size]).detach(),
                max_length=self.max_length,
                num_beams=num_beams,
                do_sample=False,
            )
            texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def _features(self, images: Images | None, features: torch.Tensor | None) -> torch.Tensor:
        if features is None:
            if images is None:
                raise ValueError("give images or their vision features")
            features = self.vision_features(images)
        return features


def mask_labels(ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Labels (B, L) for the captioning loss: the token ids, with every pad set to −100.

    transformers passes labels on as they are; without this the model is trained to write pads.
    """
    return ids.masked_fill(attention_mask == 0, IGNORED)


# ---- similarity --------------------------------------------------------------------------------


def similarity(
    blip: Blip,
    output: torch.Tensor,
    source: torch.Tensor | None,
    variant: str,
    texts: Sequence[str] | None = None,
) -> torch.Tensor:
    """BLIP-encoder similarity between a translation and its source (poster, Methods), (B,).

    Higher is more alike; differentiable in `output`. All but "vision" compare the output with
    the source's caption, its species mapped across, so that the words need not fight the pixels.

    Args:
        output, source: (B, 3, H, W), float in [-1, 1]; the source may be None where it is unused.
        variant: "vision", mean cosine of the vision tokens, place by place; "contrastive", cosine
            of image and text embeddings; "matching", log-probability that they match;
            "likelihood", mean log-probability of a word of the caption.
        texts: captions in natural words; by default BLIP writes them from the source.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}")
    if source is None and (variant == "vision" or texts is None):
        raise ValueError(f"variant {variant!r} needs the source here")
    if variant == "vision":
        assert source is not None
        with torch.no_grad():
            target = blip.vision_features(source)
        return F.cosine_similarity(blip.vision_features(output), target, dim=-1).mean(-1)
    if texts is None:
        assert source is not None
        texts = [to_natural(text) for text in blip.generate(source)]
    if variant == "contrastive":
        return (blip.image_embeds(output) * blip.text_embeds(texts)).sum(-1)
    if variant == "matching":
        return blip.itm_logits(output, texts).log_softmax(-1)[:, 1]
    return -blip.caption_loss(output, texts, reduction="none")


# ---- making, loading, saving -------------------------------------------------------------------


def tiny_config(
    vocabulary_size: int, *, image_size: int = 64, hidden_size: int = 128
) -> BlipConfig:
    """A BLIP small enough for one CPU core; token ids as `create_tiny` lays them out."""
    text = {
        "vocab_size": vocabulary_size,
        "num_hidden_layers": 3,
        "max_position_embeddings": 48,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "bos_token_id": 5,
    }
    # transformers' own default spread for the vision tower, 1e-10, cannot learn from scratch.
    vision: dict[str, Any] = {"num_hidden_layers": 4, "image_size": image_size, "patch_size": 8}
    vision["initializer_range"] = 0.02
    for part in (text, vision):
        part |= {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
        part["num_attention_heads"] = hidden_size // 32
    return BlipConfig(
        text_config=text, vision_config=vision, projection_dim=64, image_text_hidden_size=64
    )


def create_tiny(
    vocabulary: Iterable[str], *, image_size: int = 64, hidden_size: int = 128, seed: int = 0
) -> Blip:
    """A tiny BLIP from a random start, with a tokenizer that knows the given whole words.

    Any other word is spelled letter by letter, so free captions can be learnt too.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", ".", *vocabulary]
    words += [*letters, *(f"##{letter}" for letter in letters)]
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = BertTokenizer(
        vocab=ids, bos_token="[DEC]", model_input_names=["input_ids", "attention_mask"]
    )
    config = tiny_config(len(ids), image_size=image_size, hidden_size=hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        captioner = BlipForConditionalGeneration(config)
        _place_patches(captioner.vision_model.embeddings)
        retrieval = _retrieval_from(captioner)
    size = {"height": image_size, "width": image_size}
    blip = Blip(captioner.eval(), retrieval.eval(), tokenizer, BlipImageProcessorPil(size=size))
    fuse_attention(blip.parts().values())
    return blip


def load(source: str | Path, device: str | torch.device = "cpu", *, max_length: int = 40) -> Blip:
    """Load a BLIP: a folder that `save` wrote, a captioning checkpoint's folder, or a hub id.

    A captioning checkpoint brings no text encoder; it then starts from its publisher's retrieval
    checkpoint (`RETRIEVAL_OF`), else from the decoder's own weights.

    Raises:
        UserError: nothing loadable there.
    """
    place = model_source(str(source))
    both = (Path(place) / "captioner").is_dir()
    first = str(Path(place) / "captioner") if both else place
    second = str(Path(place) / "retrieval") if both else RETRIEVAL_OF.get(place)
    try:
        captioner = BlipForConditionalGeneration.from_pretrained(first, dtype=torch.float32)
        if second:
            retrieval = BlipForImageTextRetrieval.from_pretrained(second, dtype=torch.float32)
            retrieval.vision_model = captioner.vision_model
        else:
            # Its projections and matching head start at random, the same ones each time.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                retrieval = _retrieval_from(captioner)
        tokenizer = AutoTokenizer.from_pretrained(first)
        processor = BlipImageProcessorPil.from_pretrained(first)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no BLIP in {source} ({reason}): give a folder or a hub id") from None
    length = min(max_length, captioner.config.text_config.max_position_embeddings)
    blip = Blip(
        captioner.eval().to(device), retrieval.eval().to(device), tokenizer, processor, length
    )
    fuse_attention(blip.parts().values())
    return blip


def save(blip: Blip, folder: str | Path, *, half: bool = False) -> None:
    """Write `captioner/` and `retrieval/`, each complete for its transformers class.

    With `half`, weights are stored as fp16, the form in which the tiny model ships.
    """
    for name in ("captioner", "retrieval"):
        model = getattr(blip, name)
        model = copy.deepcopy(model).half() if half else model
        for part in (model, blip.tokenizer, blip.processor):
            part.save_pretrained(Path(folder) / name)


@torch.no_grad()
def _place_patches(embeddings: Any) -> None:
    """Start the patch positions as 2-D sines, still trained: left and right are told apart sooner.

    As plain ViT baselines do (Beyer et al. 2022, arXiv 2205.01580).
    """
    side, width = embeddings.image_size // embeddings.patch_size, embeddings.embed_dim // 4
    rates = 100.0 ** -torch.linspace(0, 1, width)
    waves = torch.arange(side)[:, None] * rates
    axis = torch.cat([waves.sin(), waves.cos()], dim=1)  # (side, D / 2)
    grid = torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], dim=1)
    embeddings.position_embedding[0, 1:] = 0.2 * grid


def _retrieval_from(captioner: BlipForConditionalGeneration) -> BlipForImageTextRetrieval:
    """The retrieval model on a captioner's tower; its text encoder starts as the decoder's."""
    retrieval = BlipForImageTextRetrieval(copy.deepcopy(captioner.config))
    retrieval.vision_model = captioner.vision_model
    retrieval.text_encoder.load_state_dict(captioner.text_decoder.bert.state_dict())
    return retrieval


def trainable_parameters(blip: Blip) -> int:
    """How many numbers training would change; tied and shared weights count once."""
    tensors = {p for module in blip.parts().values() for p in module.parameters()}
    return sum(p.numel() for p in tensors if p.requires_grad)


def expected_parameters(blip: Blip, rank: int) -> int:
    """How many numbers should train: all with rank 0, else adapters and heads.

    The adapters are counted from the configuration, not from the layers that `add_lora` found, so
    that a renamed layer shows.
    """
    if not rank:
        return sum(p.numel() for p in {p for m in blip.parts().values() for p in m.parameters()})
    vision, text = blip.captioner.config.vision_config, blip.captioner.config.text_config
    v, t = vision.hidden_size, text.hidden_size
    tower = vision.num_hidden_layers * (4 * v + 2 * v)  # qkv, projection
    words = text.num_hidden_layers * (6 * t + 2 * t + 2 * (v + t))  # self- and cross-attention
    heads = [blip.retrieval.vision_proj, blip.retrieval.text_proj, blip.retrieval.itm_head]
    return rank * (tower + 2 * words) + sum(p.numel() for h in heads for p in h.parameters())


def add_lora(blip: Blip, rank: int, seed: int) -> None:
    """Freeze BLIP but for its heads, and put adapters of rank `rank` beside its attention."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in ("vision_model", "text_decoder", "text_encoder"):
            inject_adapter_in_model(config, blip.parts()[name])


def merge_lora(blip: Blip) -> None:
    """Fold the adapters into the weights, so that the saved folder is a plain BLIP again."""
    from peft.tuners.lora import LoraLayer

    for module in blip.parts().values():
        for name, layer in list(module.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, layer.get_base_layer())
        for weight in module.parameters():
            weight.requires_grad_(True)
        if hasattr(module, "peft_config"):
            del module.peft_config
