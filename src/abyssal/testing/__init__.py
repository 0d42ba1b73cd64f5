"""A conformance kit for one's own model: is reconstruction exact where it must be, and close where it may be?

    print(abyssal.testing.check_block(MyBlock(), torch.randn(8, 256)))
    abyssal.testing.check_model(model, batch, policy=abyssal.Reverse(refine=1)).raise_if_failed()

`report.py` is what comes back. `observe.py` watches one call of each block in a plain forward pass,
`determinism.py` judges it. `gradients.py` compares a reconstructed training step with a plain one,
`agreement.py` judges that. `subject.py` is the private copy that all of it runs on. `policies.py` is apart from these:
what a policy of one's own has to pass.
"""

from abyssal.testing.kit import check_block, check_model
from abyssal.testing.policies import PolicySuite
from abyssal.testing.report import Finding, Report

__all__ = ["Finding", "PolicySuite", "Report", "check_block", "check_model"]
