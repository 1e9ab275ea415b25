"""Table and figure of benchmarks/methods.py, from the files of its cells."""


def write_report(args, students: dict, ablations: dict, cell_file) -> str:
    return ""
