CREATE TABLE patients (
    pseudonym TEXT PRIMARY KEY,
    split TEXT CHECK (split IN ('train', 'val', 'test'))
);
CREATE TABLE series (
    uid TEXT PRIMARY KEY,
    series_uid TEXT NOT NULL,
    study_uid TEXT NOT NULL,
    patient TEXT REFERENCES patients,
    modality TEXT NOT NULL,
    profile TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'accepted', 'refused')),
    reason TEXT,
    changed REAL NOT NULL,
    label TEXT
);
CREATE INDEX series_of_uid ON series (series_uid);
CREATE TABLE volumes (
    series TEXT PRIMARY KEY REFERENCES series,
    folder TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    num_files INTEGER NOT NULL,
    num_slices INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    num_columns INTEGER NOT NULL,
    z_mm REAL NOT NULL,
    y_mm REAL NOT NULL,
    x_mm REAL NOT NULL,
    orientation TEXT NOT NULL,
    low REAL NOT NULL,
    p1 REAL NOT NULL,
    median REAL NOT NULL,
    p99 REAL NOT NULL,
    high REAL NOT NULL
);
CREATE TABLE instances (
    uid TEXT PRIMARY KEY,
    series TEXT NOT NULL REFERENCES series,
    series_uid TEXT NOT NULL,
    marks TEXT NOT NULL,
    fault TEXT,
    is_aside INTEGER NOT NULL,
    digest TEXT,
    content TEXT,
    profile TEXT NOT NULL
);
CREATE INDEX instances_of_series ON instances (series);
CREATE INDEX instances_of_uid ON instances (series_uid);
CREATE TABLE seen (
    state TEXT PRIMARY KEY,
    root TEXT NOT NULL,
    place TEXT NOT NULL,
    series TEXT,
    run INTEGER NOT NULL
);
CREATE INDEX seen_of_place ON seen (place);
CREATE INDEX seen_of_series ON seen (series);
CREATE TABLE expected (
    series_uid TEXT PRIMARY KEY,
    num_instances INTEGER NOT NULL
);
CREATE TABLE provenance (
    series TEXT NOT NULL REFERENCES series,
    digest TEXT NOT NULL,
    source TEXT NOT NULL,
    taken TEXT NOT NULL,
    profile TEXT NOT NULL,
    software TEXT NOT NULL,
    num_files INTEGER NOT NULL,
    PRIMARY KEY (series, digest)
);
CREATE TABLE flags (
    series TEXT NOT NULL REFERENCES series,
    flag TEXT NOT NULL,
    PRIMARY KEY (series, flag)
);
CREATE TABLE maps (
    series TEXT PRIMARY KEY REFERENCES series,
    file TEXT NOT NULL UNIQUE,
    volume TEXT NOT NULL,
    digest TEXT NOT NULL,
    kind TEXT NOT NULL,
    names TEXT NOT NULL
);
CREATE TABLE segmentations (
    uid TEXT PRIMARY KEY,
    series_uid TEXT NOT NULL,
    digest TEXT NOT NULL,
    reason TEXT
);
CREATE TABLE runs (
    number INTEGER PRIMARY KEY,
    source TEXT NOT NULL,
    began TEXT NOT NULL,
    ended TEXT,
    report TEXT
);
