# To be sourced at the repository's root: installs onnxruntime's wheel into .venv and says where its library is.
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet onnxruntime==1.32.0
ORT_DYLIB_PATH=$(.venv/bin/python -c 'import glob, os, onnxruntime; print(glob.glob(os.path.join(os.path.dirname(onnxruntime.__file__), "capi", "libonnxruntime.so*"))[0])')
export ORT_DYLIB_PATH
