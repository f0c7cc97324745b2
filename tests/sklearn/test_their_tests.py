"""scikit-learn's own tests of its multilayer perceptrons, as they are installed, with our classes in place.

They are written for 1.9; another version may have other tests.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import sklearn

LBFGS = "it trains with solver='lbfgs', which is not here"
# What fails, and why. Parts of these tests that are about something else have their likes in this folder.
FAILURES = {
    "test_gradient": LBFGS + "; it calls _loss_grad_lbfgs",
    "test_lbfgs_classification[X0-y0]": LBFGS,
    "test_lbfgs_classification[X1-y1]": LBFGS,
    "test_lbfgs_regression[X0-y0]": LBFGS,
    "test_lbfgs_classification_maxfun[X0-y0]": LBFGS + ", nor its max_fun",
    "test_lbfgs_classification_maxfun[X1-y1]": LBFGS + ", nor its max_fun",
    "test_lbfgs_regression_maxfun[X0-y0]": LBFGS + ", nor its max_fun",
    "test_multilabel_classification": LBFGS,
    "test_multioutput_regression": LBFGS,
    "test_partial_fit_errors": "solver='lbfgs' must have no partial_fit; here it is refused when called",
    "test_predict_proba_multilabel": LBFGS,
    "test_sparse_matrices[csr_matrix]": LBFGS + ", and X is dense",
    "test_sparse_matrices[csr_array]": LBFGS + ", and X is dense",
    "test_warm_start": LBFGS,
    "test_mlp_warm_start_no_convergence[lbfgs-MLPClassifier]": LBFGS,
    "test_mlp_warm_start_no_convergence[lbfgs-MLPRegressor]": LBFGS,
    "test_mlp_vs_poisson_glm_equivalent[42]": LBFGS + ", nor is the Poisson loss",
}


@pytest.mark.launch
@pytest.mark.thorough
@pytest.mark.skipif(not sklearn.__version__.startswith("1.9."), reason="the list is of scikit-learn 1.9")
def test_all_but_those_on_lbfgs_pass(tmp_path):
    report = tmp_path / "report.xml"
    options = ["-q", "-p", "replace_classes", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--pyargs", "sklearn.neural_network.tests.test_mlp"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    cases = {case.get("name"): case for case in ET.parse(report).iter("testcase")}
    failures = {
        name: child.text
        for name, case in cases.items()
        for child in case
        if child.tag in ("failure", "error")
    }
    assert len(cases) >= 59 and failures.keys() == FAILURES.keys()
    for name, reason in FAILURES.items():
        if reason == LBFGS:
            assert "ValueError: solver='lbfgs': there is no L-BFGS" in failures[name], name
