"""Samplers: from noise to data.

solution     with a solution function f(x, t, s), in one or several steps
ode          fixed-step ODE solvers, Euler and Heun
diffusion    DDPM and DDIM
noise        noise and labels of a sample as a function of seed and index
"""
