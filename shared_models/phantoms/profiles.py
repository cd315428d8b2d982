"""What distinguishes one made-up hospital from another."""

from typing import NamedTuple


class HospitalProfile(NamedTuple):
    """One hospital: its scanner, how it stores pictures and whom it treats.

    Attributes:
        name: Folder name and first half of every PatientID.
        field_of_view_mm: Width and height of a slice; PixelSpacing is this divided by the size.
        noise_hu: Standard deviation of the noise in the stored picture.
        kernel_weight: Weight w of the neighbours in the filter (w, 1 - 2w, w) that stands for
            ConvolutionKernel: positive smooths, negative sharpens.
        organ_hu: Mean of the organ, which varies with the contrast agent a hospital uses.
        is_signed: PixelRepresentation 1 (signed) or 0 (unsigned).
        is_top_first: True if the first file of a series is its topmost slice.
        lesion_fraction: Share of patients with a lesion, exact in every 20 consecutive patients.
        Modality: CT, or MR, whose signal has no unit.
        bias_field: How much stronger an MR signal is at one edge of the picture than at the other.
    """

    name: str
    Manufacturer: str
    ManufacturerModelName: str
    StationName: str
    ConvolutionKernel: str
    field_of_view_mm: float
    slice_thickness_mm: float
    noise_hu: float
    kernel_weight: float
    organ_hu: float
    RescaleSlope: float
    RescaleIntercept: float
    BitsStored: int
    is_signed: bool
    is_top_first: bool
    lesion_fraction: float
    num_patients: int
    Modality: str = "CT"
    bias_field: float = 0.0


HOSPITALS: tuple[HospitalProfile, ...] = (
    HospitalProfile(
        name="st_anna",
        Manufacturer="SIEMENS",
        ManufacturerModelName="SOMATOM Phantom",
        StationName="ANNACT1",
        ConvolutionKernel="B31f",
        field_of_view_mm=300.0,
        slice_thickness_mm=8.0,
        noise_hu=12.0,
        kernel_weight=0.15,
        organ_hu=105.0,
        RescaleSlope=1.0,
        RescaleIntercept=-1024.0,
        BitsStored=12,
        is_signed=False,
        is_top_first=False,
        lesion_fraction=0.5,
        num_patients=300,
    ),
    HospitalProfile(
        name="north_clinic",
        Manufacturer="GE MEDICAL SYSTEMS",
        ManufacturerModelName="LightSpeed Phantom",
        StationName="NORTHCT2",
        ConvolutionKernel="BONEPLUS",
        field_of_view_mm=336.0,
        slice_thickness_mm=10.0,
        noise_hu=28.0,
        kernel_weight=-0.06,
        organ_hu=85.0,
        RescaleSlope=1.0,
        RescaleIntercept=0.0,
        BitsStored=16,
        is_signed=True,
        is_top_first=True,
        lesion_fraction=0.35,
        num_patients=260,
    ),
    HospitalProfile(
        name="lakeside",
        Manufacturer="TOSHIBA",
        ManufacturerModelName="Aquilion Phantom",
        StationName="LAKECT1",
        ConvolutionKernel="FC18",
        field_of_view_mm=312.0,
        slice_thickness_mm=7.0,
        noise_hu=18.0,
        kernel_weight=0.05,
        organ_hu=120.0,
        RescaleSlope=0.5,
        RescaleIntercept=-2048.0,
        BitsStored=16,
        is_signed=False,
        is_top_first=False,
        lesion_fraction=0.65,
        num_patients=220,
    ),
)

#: The fourth vendor: MR, with a bias field. Its pictures and those of HOSPITALS are unlike in kind.
MR_HOSPITAL = HospitalProfile(
    name="harbour",
    Manufacturer="Philips Medical Systems",
    ManufacturerModelName="Ingenia Phantom",
    StationName="HARBMR1",
    ConvolutionKernel="T1",
    field_of_view_mm=320.0,
    slice_thickness_mm=4.0,
    noise_hu=14.0,
    kernel_weight=0.1,
    organ_hu=95.0,
    RescaleSlope=1.0,
    RescaleIntercept=0.0,
    BitsStored=12,
    is_signed=False,
    is_top_first=False,
    lesion_fraction=0.5,
    num_patients=100,
    Modality="MR",
    bias_field=0.35,
)
VENDORS = (*HOSPITALS, MR_HOSPITAL)
