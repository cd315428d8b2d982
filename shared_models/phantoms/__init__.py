"""Three made-up hospitals with real DICOM files, for trying everything without a patient.

`write_hospitals` draws CT-like series of an abdomen (an organ, in some patients a lesion), stores
them the way three different scanners would, and adds label maps and a manifest. The same seed
always gives the same bytes. Nothing here comes from a human being, and every file says so.
`write_archives` makes what four hospitals' archives would export, with an answer key, and
`hard.write_hard_cases` the series of a bad day, for rehearsals and for judging other readers.
"""

from shared_models.phantoms.archive import write_archives
from shared_models.phantoms.hospitals import write_hospitals
from shared_models.phantoms.profiles import HOSPITALS, VENDORS, HospitalProfile

#: What the values 1, 2, ... of a label map mean.
LABELS = ("organ", "lesion")

__all__ = [
    "HOSPITALS",
    "LABELS",
    "VENDORS",
    "HospitalProfile",
    "write_archives",
    "write_hospitals",
]
