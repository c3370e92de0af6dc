"""What MedMNIST's data sets are: their task and the names of their classes, in the order of their numbers.

After the table in the `medmnist` package (https://github.com/MedMNIST/MedMNIST, info.py), names shortened in places.
"""

MULTI_LABEL = "multi-label"
KINDS = ("multi-class", "binary-class", "ordinal-regression", MULTI_LABEL)
"""How MedMNIST calls its tasks; ordered classes are learned and scored as classes without order, as there."""

_ORGANS = (
    *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right"),
    *("liver", "lung-left", "lung-right", "pancreas", "spleen"),
)
_FINDINGS = (
    *("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia"),
    *("pneumothorax", "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
)
_TISSUES = (
    *("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle"),
    *("normal colon mucosa", "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
)
_SKIN = (
    *("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions"),
    *("dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
)
_BLOOD = (
    *("basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte"),
    *("neutrophil", "platelet"),
)
_KIDNEY = (
    *("collecting duct, connecting tubule", "distal convoluted tubule", "glomerular endothelial cells"),
    *("interstitial endothelial cells", "leukocytes", "podocytes", "proximal tubule segments"),
    "thick ascending limb",
)
_ORGANS_3D = (
    *("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart"),
    *("lung-right", "lung-left", "spleen", "pancreas"),
)

FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pathmnist": ("multi-class", _TISSUES),
    "chestmnist": (MULTI_LABEL, _FINDINGS),
    "dermamnist": ("multi-class", _SKIN),
    "octmnist": (
        "multi-class",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    ),
    "pneumoniamnist": ("binary-class", ("normal", "pneumonia")),
    "retinamnist": ("ordinal-regression", ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4")),
    "breastmnist": ("binary-class", ("malignant", "normal, benign")),
    "bloodmnist": ("multi-class", _BLOOD),
    "tissuemnist": ("multi-class", _KIDNEY),
    "organamnist": ("multi-class", _ORGANS),
    "organcmnist": ("multi-class", _ORGANS),
    "organsmnist": ("multi-class", _ORGANS),
    "organmnist3d": ("multi-class", _ORGANS_3D),
    "nodulemnist3d": ("binary-class", ("benign", "malignant")),
    "adrenalmnist3d": ("binary-class", ("normal", "hyperplasia")),
    "fracturemnist3d": ("multi-class", ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture")),
    "vesselmnist3d": ("binary-class", ("vessel", "aneurysm")),
    "synapsemnist3d": ("binary-class", ("inhibitory synapse", "excitatory synapse")),
}
"""Task and names of the classes of each data set, by its flag."""
