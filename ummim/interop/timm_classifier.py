"""Fine-tuned classifiers, and linear probes, as timm models."""

from typing import Any

from torch import Tensor

from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.table_swin import TableSwin
from ummim.downstream.classify import Classifier
from ummim.errors import UserError
from ummim.interop.timm import export_timm


def classifier_to_timm(classifier: Classifier) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """A classifier's tensors as timm names them, and the timm model that takes them, as ``export_timm`` gives them.

    Raises:
        UserError: an encoder, or a place of the norm, that timm has no counterpart of.
    """
    encoder = classifier.encoder
    if classifier.norm_last:
        raise UserError("timm's Swin has its norm before the mean, and this one behind it")
    tensors, name, kwargs = export_timm(encoder)
    kwargs.pop("final_norm", None)  # the classifier has one, before its pooling or behind it
    kwargs["num_classes"] = classifier.head.out_features
    head = "head."
    if isinstance(encoder, TableSwin):
        head = "head.fc."
    else:
        kwargs["global_pool"] = "avg" if classifier.pool == "mean" else "token"
    if isinstance(encoder, RelativeViT):
        kwargs |= {"use_rel_pos_bias": encoder.config.relative_position, "use_shared_rel_pos_bias": False}
        tensors = {key.replace(".rel_pos_bias.", ".attn."): tensor for key, tensor in tensors.items()}
    tensors |= {f"fc_norm.{key}": value for key, value in classifier.fc_norm.state_dict().items()}
    return tensors | {f"{head}{key}": value for key, value in classifier.head.state_dict().items()}, name, kwargs
