"""What an encoder learned: measurements over one shared pass (`run.py`), and the report of them.

`MEASUREMENTS` holds what `hf-mim analyze` measures, in the order of the report; the contract is in `measurement.py`.
"""

from hf_mim.analysis.attention_flow import AttentionFlow
from hf_mim.analysis.cka import CKA
from hf_mim.analysis.consistency import Consistency
from hf_mim.analysis.fourier import Fourier
from hf_mim.analysis.health import FeatureHealth
from hf_mim.analysis.token_diversity import TokenDiversity


MEASUREMENTS = {
    "attention_flow": AttentionFlow,
    "token_diversity": TokenDiversity,
    "consistency": Consistency,
    "fourier": Fourier,
    "cka": CKA,
    "health": FeatureHealth,
}
