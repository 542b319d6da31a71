"""The modules that :mod:`mmvim.dropin` makes importable, under the names of other packages.

Never imported from here: :func:`mmvim.dropin.install` puts this folder on ``sys.path``.
"""
