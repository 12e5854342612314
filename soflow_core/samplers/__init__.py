"""Samplers: from noise to data.

base         interface of a sampler, and the loop over its steps
grids        time grids: where the steps end
solution     with a solution function f(x, t, s), in one or several steps
ode          fixed-step ODE solvers, Euler and Heun
diffusion    DDPM and DDIM
noise        noise and labels of a sample as a function of seed and index
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
