"""Fine-tuned classifiers as models of transformers.

A ViT with the mean of its patch tokens, fc_norm and head (MAE's fine-tuning) is no ``ViTForImageClassification``, whose
head sees the class token. It is a ``BeitForImageClassification``, which pools that way: positions are absolute, there
are no channel factors, and its keys have no bias, which changes nothing (see ``huggingface_names.BEIT``).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.table_swin import TableSwin
from ummim.backbones.vit import ViT
from ummim.downstream.classify import Classifier
from ummim.errors import UserError
from ummim.interop.huggingface import (
    HuggingFaceModel,
    beit_config,
    fixed_eps,
    model_of,
    own_tensors,
    swin_config,
    vit_config,
)
from ummim.interop.huggingface_names import BEIT, SWIN, VIT, Kind, encoder_names, prefixed, to_theirs


def classifier_to_huggingface(classifier: Classifier, names: Sequence[str] | None = None) -> HuggingFaceModel:
    """The class of transformers, config and tensors of a fine-tuned classifier.

    Args:
        classifier: the classifier.
        names: of the classes, by label; numbers unless given.

    Raises:
        UserError: an encoder that transformers does not have.
    """
    encoder, classes = classifier.encoder, _labels(classifier.head.out_features, names)
    if classifier.norm_last:
        raise UserError("transformers' Swin has its norm before the mean, and this one behind it")
    if isinstance(encoder, TableSwin):
        config = {**swin_config(encoder), **classes}
        eps, notes = fixed_eps(encoder)
        return model_of("SwinForImageClassification", config, _tensors(classifier, "swin.", SWIN), {}, eps, notes)
    if isinstance(encoder, ViT) and classifier.pool == "class":
        config = {"model_type": "vit", **vit_config(encoder), "qkv_bias": True, **classes}
        return model_of("ViTForImageClassification", config, _tensors(classifier, "vit.", VIT), {})
    if isinstance(encoder, ViT | RelativeViT):
        mean = classifier.pool == "mean"
        config = {**_beit(encoder), **classes, "use_mean_pooling": mean}
        tensors = _tensors(classifier, "beit.", BEIT)
        if mean:
            tensors |= {f"beit.pooler.layernorm.{key}": value for key, value in classifier.fc_norm.state_dict().items()}
        return model_of("BeitForImageClassification", config, tensors, {})
    raise UserError(
        f"transformers has no classifier on this {type(encoder).__name__} (position MLPs, convolutional merges or "
        "pooled keys); it can be used by ummim only"
    )


def _labels(count: int, names: Sequence[str] | None) -> dict[str, Any]:
    named = list(names) if names is not None and len(names) == count else [str(label) for label in range(count)]
    return {"id2label": dict(enumerate(named)), "label2id": {name: label for label, name in enumerate(named)}}


def _beit(encoder: ViT | RelativeViT) -> dict[str, Any]:
    if isinstance(encoder, RelativeViT):
        return beit_config(encoder)
    return {
        "model_type": "beit",
        **vit_config(encoder),
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
        "use_mask_token": False,
    }


def _tensors(classifier: Classifier, prefix: str, kind: Kind) -> dict[str, Tensor]:
    own = own_tensors(classifier.encoder)
    tensors = to_theirs(own, prefixed(prefix, encoder_names(own, kind)))
    return tensors | {f"classifier.{key}": value for key, value in classifier.head.state_dict().items()}
