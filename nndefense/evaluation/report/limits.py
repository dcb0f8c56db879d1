"""The section on what the numbers do not show."""

from __future__ import annotations

from nndefense.evaluation.report.records import Results
from nndefense.reporting import limits_list, section
from nndefense.reporting.wording import number


def limits_section(results: Results) -> str:
    """The limits of the run, as a list."""
    calibration, database = results.get("calibration"), results.get("database") or {}
    informed = {record["threat_model"] for record in results["records"]} & {"white", "adaptive"}
    limits = [
        (
            "No attack is the strongest there is.",
            "The adaptive attacks know the database and its settings, and every attacked image was judged by the true "
            "defence. Another attack may still find what these did not: read the worst case as an upper bound.",
        )
        if informed
        else (
            "No attack here knows of the database.",
            "The gray-box attack uses the classifier's weights and the black-box attack a surrogate; both ignore the "
            "retrieval. An attacker who knows the database, or can guess at part of it, can aim at the retrieval "
            "itself. Such adaptive attacks are not part of this report, and the authors of the method describe two "
            "that break it. Read the accuracies under attack as upper bounds.",
        ),
        (
            "The settings were chosen under attack.",
            "Layer, pooling, number of neighbours and weighting are those that did best on the calibration images, "
            f"{number(calibration.get('n', 0))} of {calibration.get('dataset', 'a data set not recorded')}. "
            "Another attack or budget might ask for others.",
        )
        if calibration
        else (
            "The settings were not calibrated in this run.",
            "Other layers, numbers of neighbours or weightings may do better or worse.",
        ),
        (
            "The database is small.",
            f"It holds {number(database['rows'])} images; the method was proposed for up to billions. "
            "Digit and MNIST-scale databases say nothing about web-scale ones, neither for nor against.",
        )
        if (database.get("rows") or 0) < 10_000_000 and database.get("rows") is not None
        else (
            "Size is not everything.",
            "Another database of the same size, gathered otherwise, can give other numbers.",
        ),
        (
            "The paper's Table 2 is not comparable.",
            "The table above has its shape only. The paper's is about ImageNet, ResNet-50 and normalised ℓ₂ 0.06, and "
            "its rows come from several models and protocols.",
        ),
        (
            "The intervals cover the choice of images only.",
            "They do not cover training the classifier again, other seeds, a stronger attack or another classifier. "
            "Images in the database that nearly repeat a test image, if there are any, hand the defence the answer.",
        ),
    ]
    return section("What these numbers do not show", limits_list(limits), "limits")
