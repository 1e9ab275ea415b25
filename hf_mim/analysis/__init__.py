"""What an encoder learned: measurements over one shared pass (`run.py`), and the report of them.

`MEASUREMENTS` holds what `hf-mim analyze` measures, in the order of the report; the contract is in `measurement.py`.
"""

from hf_mim.analysis.attention_flow import AttentionFlow


MEASUREMENTS = {"attention_flow": AttentionFlow}
