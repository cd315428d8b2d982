"""What a released model says about one study, as a doctor can read it, inside the hospital.

From a release (``release.py``) and a study (``study.py``) to an answer on the study's own voxels
(``infer.py``; ``kinds.py``: by what the task's outputs mean), and from there to DICOM objects
(``objects.py``) and to ``prediction.json`` (``prediction.py``), from which alone the doctor's page
and the patient's page are made (``pages.py``).
"""
